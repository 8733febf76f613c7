"""Errors of arrays: axes made canonical, shapes, dtypes, masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from operator import index
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def inexact(called: str, name: str, value: ArrayLike, *, real: bool = False) -> Array:
    """An array that can be averaged: floating or complex, floating alone if `real`."""
    array = as_array(called, name, value, "an array of floating numbers")
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(
            f"{called}: {name} has dtype {array.dtype}, expected a floating or complex dtype. "
            f"Convert it first: jnp.asarray({name}, jnp.float32)."
        )
    if real and jnp.iscomplexobj(array):
        raise TypeError(
            f"{called}: {name} has dtype {array.dtype}, expected a real dtype, since the result "
            f"is real or {name} is real by its nature. Pass {name}.real, or a complex x."
        )
    return array


def as_array(called: str, name: str, value: ArrayLike, expected: str) -> Array:
    """What JAX takes for an array. It would stack a list of arrays, one for each device perhaps."""
    if isinstance(value, (list, tuple)):
        raise TypeError(
            f"{called}: {name} is a {type(value).__name__} of length {len(value)}, expected "
            f"{expected}. Pass one array; make one of numbers by jnp.asarray({name})."
        )
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        dtype = getattr(value, "dtype", None)
        got = type(value).__name__ if dtype is None else f"an array of dtype {dtype}"
        raise TypeError(f"{called}: {name} is {got}, expected {expected}.") from None


def axes(
    called: str, name: str, given: int | Iterable[int], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Axes as sorted, non-negative, distinct integers; none is a choice too, as in Flax."""
    rank = len(shape)
    try:
        wanted = tuple(map(whole, given if isinstance(given, Iterable) else (given,)))
    except TypeError:
        raise TypeError(
            f"{called}: {name}={given!r}, expected an integer or a sequence of integers."
        ) from None
    for axis in wanted:
        if not -rank <= axis < rank:
            raise ValueError(
                f"{called}: {name}={given!r} is out of range for x with shape {shape}, which has "
                f"{rank} {'axis' if rank == 1 else 'axes'}. Choose from {-rank} to {rank - 1}."
                if rank
                else f"{called}: x is a scalar, expected an array with at least the axis "
                f"{name}={given!r}. Give x that axis, for example x[None]."
            )
    canonical = tuple(sorted(axis % rank for axis in wanted))
    if len(set(canonical)) < len(canonical):
        raise ValueError(
            f"{called}: {name}={given!r} names an axis of x with shape {shape} twice. "
            "Name each axis once."
        )
    return canonical


def axis(called: str, name: str, given: int, shape: tuple[int, ...]) -> int:
    """One axis alone, as a non-negative integer."""
    if isinstance(given, Iterable):
        raise TypeError(f"{called}: {name}={given!r}, expected one integer.")
    return axes(called, name, given, shape)[0]


def reduced_axes(
    called: str,
    name: str,
    given: int | Iterable[int],
    shape: tuple[int, ...],
    *,
    batch: bool = False,
) -> tuple[int, ...]:
    """The axes that are not features, and not the first if that is a batch."""
    features = axes(called, name, given, shape)
    if batch and 0 in features:
        raise ValueError(
            f"{called}: The channel axes cannot include the leading dimension as this is assumed "
            f"to be the batch axis. Got {name}={given!r} for x with shape {shape}, expected axes "
            "other than 0. Move the batch there."
        )
    return tuple(a for a in range(int(batch), len(shape)) if a not in features)


def feature_vector(
    called: str,
    name: str,
    value: ArrayLike,
    expected: tuple[int, ...],
    feature_axis: int | Iterable[int],
    shape: tuple[int, ...],
    *,
    real: bool,
) -> Array:
    """A parameter or statistic with one value for each feature."""
    array = inexact(called, name, value, real=real)
    if array.shape != expected:
        remedy = "If the features of x lie on another axis, pass feature_axis=."
        # As text, since symbolic sizes have no order.
        if sorted(map(str, array.shape)) == sorted(map(str, expected)):
            remedy = "Several feature axes keep the order that they have in x."
        raise ValueError(
            f"{called}: {name} has shape {array.shape}, expected {expected}, the size of "
            f"feature_axis={feature_axis!r} of x with shape {shape}. {remedy}"
        )
    return array


def affine(
    called: str,
    name: str,
    value: ArrayLike | None,
    kept: tuple[int, ...],
    feature_axis: int | Iterable[int],
    shape: tuple[int, ...],
    *,
    real: bool,
) -> Any:
    """A scale or bias in the rank of x: one for each feature, or for each of each example."""
    if value is None:
        return None
    array = inexact(called, name, value, real=real)
    expected = tuple(shape[a] for a in kept)
    if 0 not in kept and array.shape == (*shape[:1], *expected):
        kept = (0, *kept)
    else:
        feature_vector(called, name, array, expected, feature_axis, shape, real=real)
    return array.reshape([n if a in kept else 1 for a, n in enumerate(shape)])


def something(
    called: str, shape: tuple[int, ...], reduced: tuple[int, ...], *, name: str = "x"
) -> None:
    """Nothing has no statistics."""
    if any(shape[a] == 0 for a in reduced):
        raise ValueError(
            f"{called}: {name} with shape {shape} has no element over the axes {reduced}, expected "
            "at least one to take statistics of. Leave empty inputs out."
        )


def group_axes(
    called: str, given: int | Iterable[int] | None, feature_axis: int, shape: tuple[int, ...]
) -> None:
    """Flax lists the feature axis among those that are reduced; a list without it is a mistake."""
    if given is None:
        return
    feature = axis(called, "feature_axis", feature_axis, shape)
    if feature not in axes(called, "reduction_axes", given, shape):
        which = "final dimension" if feature == len(shape) - 1 else f"axis {feature}"
        raise ValueError(
            f"{called}: The reduction axes must include the {which} as this is assumed to be the "
            f"feature axis. Got reduction_axes={given!r} and feature_axis={feature_axis} for x of "
            f"shape {shape}, expected {feature} among the first. Add it."
        )


def number_of_groups(
    called: str, num_groups: int | None, group_size: int | None, features: int
) -> int:
    """Exactly one of both is given, and divides the features."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"{called}: Either `num_groups` or `group_size` should be specified. If `group_size` "
            "is to be specified, pass `num_groups=None` as argument to override the default "
            f"`num_groups` value of 32. Got num_groups={num_groups} and group_size={group_size}, "
            "expected one of them (only the modules have a default). Pass None for the other."
        )
    name, given = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    try:
        given = whole(given)
    except TypeError:
        raise TypeError(
            f"{called}: {name}={given!r}, expected a whole number that divides the {features} "
            "features of x. Pass an integer."
        ) from None
    # Of a symbolic size it is known whether a number divides it, but not which ones do.
    candidates = range(1, features + 1) if isinstance(features, int) else {1, given}
    divisors = [n for n in candidates if n and features % n == 0]
    if given not in divisors:
        kind = (
            f"Number of groups ({given}) does not divide the number of channels ({features})."
            if group_size is None
            else f"Number of channels ({features}) is not multiple of the group size ({given})."
        )
        raise ValueError(f"{called}: {kind} Expected {name} to be one of {divisors}.")
    return given if group_size is None else features // given


def broadcast(
    called: str,
    name: str,
    value: ArrayLike,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    real: bool,
) -> Array:
    """An array that broadcasts to x, its rank raised to that of x; a Python number has `dtype`."""
    value = np.asarray(value, dtype) if type(value) in (int, float) else value
    array = inexact(called, name, value, real=real)
    if not fits(array.shape, shape):
        raise ValueError(
            f"{called}: {name} has shape {array.shape}, which does not broadcast to x with shape "
            f"{shape}. Give it the rank of x, with size 1 on every axis that it shares."
        )
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)


def scalar(called: str, name: str, value: ArrayLike, dtype: np.dtype) -> Array:
    """One real number, learned or not, in `dtype`."""
    array = inexact(called, name, float(value) if type(value) is int else value, real=True)
    if array.shape:
        raise ValueError(
            f"{called}: {name} has shape {array.shape}, expected (), one number for all of x."
        )
    return array.astype(dtype)


def mask(called: str, value: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """A boolean mask of the rank of x, whose broadcast has one reading only."""
    if value is None:
        return None
    array = as_array(called, "mask", value, "an array of booleans, True where an entry counts")
    if array.dtype != bool:
        raise TypeError(
            f"{called}: mask has dtype {array.dtype}, expected bool, True where an entry counts. "
            "Pass mask=mask.astype(bool) if nonzero means that it counts."
        )
    got = array.shape
    numpy_reading = fits(got, shape)
    # What people mean by a short mask is one entry for each example, along the leading axes.
    leading = got + (1,) * (len(shape) - len(got))
    leading_reading = len(got) < len(shape) and fits(leading, shape)
    over_examples = f"mask.reshape({leading})"
    if numpy_reading and leading_reading and any(n != 1 for n in got):
        over_features = (1,) * (len(shape) - len(got)) + got
        raise ValueError(
            f"{called}: mask has shape {got}, which has two readings for x with shape {shape}: "
            f"over the leading axes or over the trailing ones. Pass {over_examples} for the "
            f"first or mask.reshape({over_features}) for the second."
        )
    if not numpy_reading:
        remedy = (
            f"If it has one entry for each index of the leading axes, pass {over_examples}."
            if leading_reading
            else "Give it the rank of x, with size 1 on every axis that it shares."
        )
        raise ValueError(
            f"{called}: mask has shape {got}, which does not broadcast to x with shape {shape}. "
            + remedy
        )
    return array.reshape((1,) * (len(shape) - len(got)) + got)


def nonzero(called: str, value: ArrayLike | None) -> Array | None:
    """A mask of Flax, in which any nonzero is True."""
    if value is None:
        return None
    expected = "an array of booleans or numbers, nonzero where an entry counts"
    array = as_array(called, "mask", value, expected)
    if array.dtype != bool and not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{called}: mask has dtype {array.dtype}, expected {expected}.")
    return array.astype(bool)


def fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Whether an array of the one shape broadcasts to the other."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(s in (1, n) for s, n in pairs)


def features(called: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The one shape of moments to be merged; () stands for any."""
    found = {shape for shape in shapes if shape}
    if len(found) > 1:
        raise ValueError(
            f"{called}: got moments of the shapes {sorted(found, key=str)}, expected equal ones. "
            "Measure all pieces over the same features."
        )
    return found.pop() if found else ()


def entries(
    called: str,
    shape: tuple[int, ...],
    reduced: tuple[int, ...],
    shared: int,
    asked: str = "train=True",
    instead: str = "pass train=False.",
) -> None:
    """Training needs at least two values for each feature, counted over all devices."""
    local = prod(shape[a] for a in reduced)
    # A symbolic size, as in an export for any batch, is not known to be too small.
    if not isinstance(local, int) or local * shared > 1:
        return
    where = f"over the axes {reduced}{f' of {shared} devices' if shared > 1 else ''}"
    reason = ", since one value normalizes to 0 whatever it is" if local else ""
    raise ValueError(
        f"{called}: x with shape {shape} has {'one' if local else 'no'} value for each feature "
        f"{where}, expected at least two with {asked}{reason}. Use a larger batch"
        f"{'' if reduced else ', along a leading batch axis'}, share statistics over devices with "
        f"axis_name, or {instead}"
    )


def matrix(called: str, shape: tuple[int, ...], stats: Any, kind: type, n_steps: int) -> None:
    """A weight that has singular values, and a state to start from."""
    start = f"{kind.__name__}(jax.random.normal(key, (1, w.shape[-1])), jnp.ones(()))"
    if not isinstance(stats, kind):
        raise TypeError(
            f"{called}: stats is {type(stats).__name__}, expected {kind.__name__}. Start from "
            f"{start}."
        )
    if len(shape) < 2:
        raise ValueError(
            f"{called}: w has shape {shape}, expected a rank of at least 2, since a vector has no "
            "singular values. Leave biases and scales as they are."
        )
    something(called, shape, tuple(range(len(shape))), name="w")
    for name, expected in {"u": (1, shape[-1]), "sigma": ()}.items():
        got = inexact(called, f"stats.{name}", getattr(stats, name), real=True).shape
        if got != expected:
            raise ValueError(
                f"{called}: stats.{name} has shape {got}, expected {expected} for w with shape "
                f"{shape}. Start from {start}."
            )
    if not isinstance(n_steps, (int, np.integer)) or n_steps < 1:
        raise ValueError(
            f"{called}: n_steps={n_steps}, expected at least 1: without a step sigma is unknown."
        )


def same_shape_and_dtype(called: str, x: ArrayLike, residual: ArrayLike) -> tuple[Array, Array]:
    """Two terms of one shape and dtype: a broadcast here would hide a mistake."""
    x, residual = inexact(called, "x", x), inexact(called, "residual", residual)
    if x.shape != residual.shape:
        raise ValueError(
            f"{called}: residual has shape {residual.shape}, expected {x.shape}, that of x. "
            "Broadcast it first if that is meant."
        )
    if x.dtype != residual.dtype:
        raise TypeError(
            f"{called}: residual has dtype {residual.dtype}, expected {x.dtype}, that of x. "
            "Convert one of them first."
        )
    return x, residual


def window(called: str, size: int) -> None:
    """A window holds a feature at least."""
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"{called}: size={size!r}, expected a whole number of at least 1.")


def shape(called: str, given: int | Iterable[int]) -> tuple[int, ...]:
    """The shape of an array that is to be made."""
    try:
        sizes = tuple(map(whole, given if isinstance(given, Iterable) else (given,)))
        possible = min(sizes, default=0) >= 0
    except TypeError:
        possible = False
    if not possible:
        raise TypeError(
            f"{called}: shape={given!r}, expected a whole number of at least 0 or a sequence of "
            "such, the sizes of the feature axes."
        )
    return sizes


def whole(value: Any) -> int:
    """An integer; a bool, which Python takes for one, is a mistake."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    return index(value)
