"""Errors of arrays: axes made canonical, shapes, dtypes, masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Shape = tuple[int, ...]
Axes = int | Iterable[int]


class Features(NamedTuple):
    """Which axes of an x are its features."""

    x: Shape  # the shape of x
    given: Axes  # the axes as passed by the caller
    axes: Shape  # as sorted, non-negative integers
    shape: Shape  # their sizes
    reduced: Shape  # the other axes; without the batch axis if examples are normalized separately


def features(shape: Shape, given: Axes, *, batch: bool = False) -> Features:
    """The features of an x of this shape; with `batch`, its first axis is the batch."""
    kept = axes("feature_axis", given, shape)
    if batch and 0 in kept:
        raise ValueError(
            "normjax: The channel axes cannot include the leading dimension as this is assumed "
            f"to be the batch axis. Got feature_axis={given!r} for x with shape {shape}, expected "
            "axes other than 0. Move the batch there."
        )
    reduced = [a for a in range(int(batch), len(shape)) if a not in kept]
    return Features(shape, given, kept, tuple([shape[a] for a in kept]), tuple(reduced))


def inexact(name: str, value: ArrayLike, *, real: bool = False) -> Array:
    """An array that can be averaged: floating or complex, only floating if `real`."""
    # A JAX array is not converted: the conversion takes longer than all checks.
    if not isinstance(value, Array):
        value = as_array(name, value, "an array of floating numbers")
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"normjax: {name} has dtype {value.dtype}, expected a floating or complex dtype. "
            f"Convert it first: jnp.asarray({name}, jnp.float32)."
        )
    if real and value.dtype.kind == "c":
        raise TypeError(
            f"normjax: {name} has dtype {value.dtype}, expected a real dtype, since the result "
            f"is real or {name} is always real. Pass {name}.real, or a complex x."
        )
    return value


def as_array(name: str, value: ArrayLike, expected: str) -> Array:
    """A JAX array. Lists are rejected: JAX would stack the arrays of several devices."""
    if isinstance(value, (list, tuple)):
        raise TypeError(
            f"normjax: {name} is a {type(value).__name__} of length {len(value)}, expected "
            f"{expected}. Pass one array; make one of numbers by jnp.asarray({name})."
        )
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        dtype = getattr(value, "dtype", None)
        got = type(value).__name__ if dtype is None else f"an array of dtype {dtype}"
        raise TypeError(f"normjax: {name} is {got}, expected {expected}.") from None


def axes(name: str, given: Axes, shape: Shape) -> Shape:
    """Axes as sorted, non-negative, distinct integers; an empty tuple is allowed, as in Flax."""
    if isinstance(given, tuple) and not given:
        return given
    rank, canonical = len(shape), set()
    wanted = whole_numbers(name, given, "an integer or a sequence of integers.")
    if wanted and not rank:
        raise ValueError(
            f"normjax: x is a scalar, expected an array with at least the axis {name}={given!r}. "
            "Give x that axis, for example x[None]."
        )
    for axis in wanted:
        if not -rank <= axis < rank:
            raise ValueError(
                f"normjax: {name}={given!r} is out of range for x with shape {shape}, which has "
                f"{rank} {'axis' if rank == 1 else 'axes'}. Choose from {-rank} to {rank - 1}."
            )
        canonical.add(axis % rank)
    if len(canonical) < len(wanted):
        raise ValueError(
            f"normjax: {name}={given!r} names an axis of x with shape {shape} twice. Name each "
            "axis once."
        )
    return tuple(sorted(canonical))


def axis(name: str, given: int, shape: Shape) -> int:
    """A single axis, as a non-negative integer."""
    if isinstance(given, Iterable):
        raise TypeError(f"normjax: {name}={given!r}, expected one integer.")
    return axes(name, given, shape)[0]


def feature_vector(name: str, value: ArrayLike, features: Features, *, real: bool) -> Array:
    """A parameter or statistic with one value for each feature."""
    array = inexact(name, value, real=real)
    if array.shape != features.shape:
        _refuse_shape(name, array.shape, features)
    return array


def affine(name: str, value: ArrayLike | None, features: Features, *, real: bool) -> Any:
    """A scale or bias in the rank of x: for each feature, or for each feature of each example."""
    if value is None:
        return None
    array, kept = inexact(name, value, real=real), features.axes
    if array.shape != features.shape:
        if 0 in kept or array.shape != (*features.x[:1], *features.shape):
            _refuse_shape(name, array.shape, features)
        kept = (0, *kept)
    return array.reshape([n if a in kept else 1 for a, n in enumerate(features.x)])


def _refuse_shape(name: str, got: Shape, features: Features) -> NoReturn:
    remedy = "If the features of x lie on another axis, pass feature_axis=."
    # As text, since symbolic sizes have no order.
    if sorted(map(str, got)) == sorted(map(str, features.shape)):
        remedy = "Several feature axes keep the order that they have in x."
    raise ValueError(
        f"normjax: {name} has shape {got}, expected {features.shape}, the size of "
        f"feature_axis={features.given!r} of x with shape {features.x}. {remedy}"
    )


def expect_shape(name: str, got: Shape, expected: Shape, rest: str) -> None:
    """Expects a shape; `rest` says whose shape it is and what to do."""
    if got != expected:
        raise ValueError(f"normjax: {name} has shape {got}, expected {expected}{rest}")


def expect_kind(name: str, value: object, kind: type, expected: str) -> None:
    """Expects an instance of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"normjax: {name} is {type(value).__name__}, expected {expected}")


def nonempty(shape: Shape, reduced: Shape, *, name: str = "x") -> None:
    """Statistics need at least one element."""
    if 0 in [shape[a] for a in reduced]:
        raise ValueError(
            f"normjax: {name} with shape {shape} has no element over the axes {reduced}, expected "
            "at least one to take statistics of. Leave empty inputs out."
        )


def group_axes(given: Axes | None, feature_axis: int, shape: Shape) -> None:
    """Flax lists the feature axis among those that are reduced; a list without it is a mistake."""
    if given is None:
        return
    feature = axis("feature_axis", feature_axis, shape)
    if feature not in axes("reduction_axes", given, shape):
        which = "final dimension" if feature == len(shape) - 1 else f"axis {feature}"
        raise ValueError(
            f"normjax: The reduction axes must include the {which} as this is assumed to be the "
            f"feature axis. Got reduction_axes={given!r} and feature_axis={feature_axis} for x of "
            f"shape {shape}, expected {feature} among the first. Add it."
        )


def number_of_groups(
    num_groups: int | None, group_size: int | None, features: int, noun: str = "channels"
) -> int:
    """Exactly one of both is given, and divides the features; `noun` is Flax's word for these."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"normjax: Either `num_groups` or `group_size` should be specified. If `group_size` "
            "is to be specified, pass `num_groups=None` as argument to override the default "
            f"`num_groups` value of 32. Got num_groups={num_groups} and group_size={group_size}, "
            "expected one of them (only the modules have a default). Pass None for the other."
        )
    name, given = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    expected = f"a whole number that divides the {features} features of x. Pass an integer."
    given = whole(name, given, expected)
    # One can ask whether a number divides a symbolic size, but not list its divisors.
    candidates = range(1, features + 1) if isinstance(features, int) else {1, given}
    divisors = [n for n in candidates if n and features % n == 0]
    if given not in divisors:
        fault = f"Number of groups ({given}) does not divide the number of channels ({features})."
        if group_size is not None:
            fault = f"Number of {noun} ({features}) is not multiple of the group size ({given})."
        raise ValueError(f"normjax: {fault} Expected {name} to be one of {divisors}.")
    return given if group_size is None else features // given


def broadcast(name: str, value: ArrayLike, shape: Shape, dtype: np.dtype, *, real: bool) -> Array:
    """An array that broadcasts to x, its rank raised to that of x; a Python number has `dtype`."""
    value = np.asarray(value, dtype) if type(value) in (int, float) else value
    array = inexact(name, value, real=real)
    if not fits(array.shape, shape):
        _refuse_broadcast(name, array.shape, shape)
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)


def scalar(name: str, value: ArrayLike, dtype: np.dtype) -> Array:
    """One real number, learned or not, in `dtype`."""
    array = inexact(name, float(value) if type(value) is int else value, real=True)
    expect_shape(name, array.shape, (), ", one number for all of x.")
    return array.astype(dtype)


def mask(value: ArrayLike | None, shape: Shape) -> Array | None:
    """A boolean mask in the rank of x; an ambiguous shape is an error."""
    if value is None:
        return None
    array = as_array("mask", value, "an array of booleans, True where an entry counts")
    if array.dtype != bool:
        raise TypeError(
            f"normjax: mask has dtype {array.dtype}, expected bool, True where an entry counts. "
            "Pass mask=mask.astype(bool) if nonzero means that it counts."
        )
    got, ones = array.shape, (1,) * (len(shape) - array.ndim)
    numpy_reading = fits(got, shape)
    # A mask of lower rank usually means one entry for each example, along the leading axes.
    leading, trailing = got + ones, ones + got
    leading_reading = len(got) < len(shape) and fits(leading, shape)
    if numpy_reading and leading_reading and any(n != 1 for n in got):
        raise ValueError(
            f"normjax: mask has shape {got}, which has two readings for x with shape {shape}: "
            f"over the leading axes or over the trailing ones. Pass mask.reshape({leading}) for "
            f"the first or mask.reshape({trailing}) for the second."
        )
    if not numpy_reading:
        _refuse_broadcast("mask", got, shape, leading if leading_reading else None)
    return array.reshape(trailing)


def _refuse_broadcast(name: str, got: Shape, x: Shape, leading: Shape | None = None) -> NoReturn:
    remedy = "Give it the rank of x, with size 1 on every axis that it shares."
    if leading is not None:
        entries = "one entry for each index of the leading axes"
        remedy = f"If it has {entries}, pass {name}.reshape({leading})."
    raise ValueError(
        f"normjax: {name} has shape {got}, which does not broadcast to x with shape {x}. {remedy}"
    )


def nonzero(value: ArrayLike | None) -> Array | None:
    """A mask of Flax, in which any nonzero is True."""
    if value is None:
        return None
    expected = "an array of booleans or numbers, nonzero where an entry counts"
    array = as_array("mask", value, expected)
    if array.dtype != bool and not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"normjax: mask has dtype {array.dtype}, expected {expected}.")
    return array.astype(bool)


def fits(small: Shape, large: Shape) -> bool:
    """Whether an array of the one shape broadcasts to the other."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(s in (1, n) for s, n in pairs)


def common_shape(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """The common shape of the moments to merge; () fits any."""
    found = {shape for shape in shapes if shape}
    if len(found) > 1:
        raise ValueError(
            f"normjax: got moments of the shapes {sorted(found, key=str)}, expected equal ones. "
            "Measure all pieces over the same features."
        )
    return found.pop() if found else ()


def matrix(shape: Shape, stats: Any, kind: type, n_steps: int) -> None:
    """Checks that a weight has singular values, and the state of its power iteration."""
    start = f"{kind.__name__}(jax.random.normal(key, (1, w.shape[-1])), jnp.ones(()))"
    expect_kind("stats", stats, kind, f"{kind.__name__}. Start from {start}.")
    if len(shape) < 2:
        raise ValueError(
            f"normjax: w has shape {shape}, expected a rank of at least 2, since a vector has no "
            "singular values. Do not normalize biases and scales."
        )
    nonempty(shape, tuple(range(len(shape))), name="w")
    for name, expected in {"u": (1, shape[-1]), "sigma": ()}.items():
        got = inexact(f"stats.{name}", getattr(stats, name), real=True).shape
        rest = f" for w with shape {shape}. Start from {start}."
        expect_shape(f"stats.{name}", got, expected, rest)
    if not isinstance(n_steps, (int, np.integer)) or n_steps < 1:
        raise ValueError(
            f"normjax: n_steps={n_steps}, expected at least 1: without a step sigma is unknown."
        )


def same_shape_and_dtype(x: ArrayLike, residual: ArrayLike) -> tuple[Array, Array]:
    """Two terms of one shape and dtype: a broadcast here would hide a mistake."""
    x, residual = inexact("x", x), inexact("residual", residual)
    rest = ", that of x. Broadcast it first if that is meant."
    expect_shape("residual", residual.shape, x.shape, rest)
    if x.dtype != residual.dtype:
        raise TypeError(
            f"normjax: residual has dtype {residual.dtype}, expected {x.dtype}, that of x. "
            "Convert one of them first."
        )
    return x, residual


def window(size: int) -> None:
    """A window has at least one feature."""
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"normjax: size={size!r}, expected a whole number of at least 1.")


def shape(given: Axes) -> Shape:
    """The shape of a new array."""
    expected = "a whole number of at least 0 or a sequence of them, the sizes of the feature axes."
    sizes = whole_numbers("shape", given, expected)
    if min(sizes, default=0) < 0:
        raise TypeError(f"normjax: shape={given!r}, expected {expected}")
    return sizes


def whole_numbers(name: str, given: Axes, expected: str) -> tuple[int, ...]:
    """One integer or several. A bool, which is an int in Python, is rejected."""
    try:
        listed = tuple(given) if isinstance(given, Iterable) else (given,)
        if not {bool, np.bool_}.isdisjoint(map(type, listed)):
            raise TypeError
        return tuple(map(index, listed))
    except TypeError:
        raise TypeError(f"normjax: {name}={given!r}, expected {expected}") from None


def whole(name: str, value: Any, expected: str) -> int:
    """A single integer; an array of rank 0 is accepted."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return index(value)
    except TypeError:
        raise TypeError(f"normjax: {name}={value!r}, expected {expected}") from None
