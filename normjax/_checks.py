"""Axes made canonical; every error of shape, dtype, range and mode is worded here alone.

Each message says what was called, what it got, what it expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from operator import index
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike


def inexact(called: str, name: str, value: ArrayLike, *, real: bool = False) -> Array:
    """An array that can be averaged: floating or complex, floating alone if `real`."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{called}: {name} is {type(value).__name__}, expected an array of floating numbers."
        ) from None
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


def output_dtype(called: str, dtype: DTypeLike | None, of_x: np.dtype) -> np.dtype:
    """The dtype of the result: that of x unless one was asked for."""
    if dtype is None:
        return of_x
    result = jnp.dtype(dtype)
    if not jnp.issubdtype(result, jnp.inexact):
        raise TypeError(
            f"{called}: dtype={result}, expected a floating or complex dtype, "
            "for example jnp.float32 or jnp.bfloat16."
        )
    if jnp.issubdtype(of_x, jnp.complexfloating) > jnp.issubdtype(result, jnp.complexfloating):
        raise TypeError(
            f"{called}: dtype={result} would drop the imaginary part of x with dtype {of_x}. "
            "Pass a complex dtype, or x.real."
        )
    return result


def axes(
    called: str, name: str, given: int | Iterable[int], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Axes as sorted, non-negative, distinct integers, at least one."""
    rank = len(shape)
    try:
        wanted = tuple(map(index, given if isinstance(given, Iterable) else (given,)))
    except TypeError:
        raise TypeError(
            f"{called}: {name}={given!r}, expected an integer or a sequence of integers."
        ) from None
    if not wanted:
        raise ValueError(f"{called}: {name}={given!r} names no axis, expected at least one.")
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


def reduced_axes(
    called: str, name: str, given: int | Iterable[int], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The axes that are not features; there must be one to take a mean over."""
    features = axes(called, name, given, shape)
    reduced = tuple(a for a in range(len(shape)) if a not in features)
    if not reduced:
        raise ValueError(
            f"{called}: x with shape {shape} has no axis beside {name}={given!r}, expected a "
            "batch axis to take statistics over. Pass x with a leading batch axis."
        )
    return reduced


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
        if sorted(array.shape) == sorted(expected):
            remedy = "Several feature axes keep the order that they have in x."
        raise ValueError(
            f"{called}: {name} has shape {array.shape}, expected {expected}, the size of "
            f"feature_axis={feature_axis!r} of x with shape {shape}. {remedy}"
        )
    return array


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
    value = np.asarray(value, dtype) if isinstance(value, (int, float)) else value
    array = inexact(called, name, value, real=real)
    if not _fits(array.shape, shape):
        raise ValueError(
            f"{called}: {name} has shape {array.shape}, which does not broadcast to x with shape "
            f"{shape}. Give it the rank of x, with size 1 on every axis that it shares."
        )
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)


def mask(called: str, value: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """A boolean mask of the rank of x, whose broadcast has one reading only."""
    if value is None:
        return None
    array = jnp.asarray(value)
    if array.dtype != bool:
        raise TypeError(
            f"{called}: mask has dtype {array.dtype}, expected bool, True where an entry counts. "
            "Pass mask=mask.astype(bool) if nonzero means that it counts."
        )
    got = array.shape
    numpy_reading = _fits(got, shape)
    # What people mean by a short mask is one entry for each example, along the leading axes.
    leading = got + (1,) * (len(shape) - len(got))
    leading_reading = len(got) < len(shape) and _fits(leading, shape)
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


def _fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(s in (1, n) for s, n in pairs)


def _number(called: str, name: str, value: Any, expected: str) -> float | None:
    """A number as a float; None for a traced one, which is taken on trust."""
    kinds = (int, float, np.integer, np.floating, np.ndarray, jax.Array)
    if not isinstance(value, kinds) or np.ndim(value) or jnp.iscomplexobj(value):
        got = f"an array of shape {np.shape(value)}" if np.ndim(value) else repr(value)
        raise TypeError(f"{called}: {name} is {got}, expected {expected}.")
    return None if isinstance(value, jax.core.Tracer) else float(value)


def epsilon(called: str, value: ArrayLike) -> None:
    """What is added to the variance; zero is allowed."""
    expected = "a finite number of at least 0, which is added to the variance"
    number = _number(called, "epsilon", value, expected)
    if number is not None and not 0 <= number < float("inf"):
        raise ValueError(f"{called}: epsilon={value}, expected {expected}, for example 1e-5.")


def momentum(called: str, value: ArrayLike | None, debias: bool) -> None:
    """The weight of the old value; None asks for the plain average."""
    if value is None:
        return
    expected = "a number from 0 to 1, the weight of the OLD running value"
    number = _number(called, "momentum", value, expected)
    if number is not None and not 0 <= number <= 1:
        raise ValueError(
            f"{called}: momentum={value}, expected {expected} (PyTorch's momentum m is 1 - m "
            "here), or None for the plain average over all batches."
        )
    if debias and number == 1:
        raise ValueError(
            f"{called}: momentum=1 with debias=True never takes anything in, so there is no "
            "start to correct for. Pass momentum=None for the plain average over all batches."
        )


def ddof(called: str, value: float) -> None:
    """The correction of the running variance."""
    expected = (
        "a number of at least 0: 0 for the biased running variance (Flax, the paper), 1 for the "
        "unbiased one (PyTorch)"
    )
    number = _number(called, "ddof", value, expected)
    if number is not None and not 0 <= number < float("inf"):
        raise ValueError(f"{called}: ddof={value}, expected {expected}.")


def switch(called: str, name: str, value: object) -> bool:
    """A mode is decided while tracing, so it cannot be a traced value."""
    if not isinstance(value, (bool, np.bool_)):
        traced = isinstance(value, jax.core.Tracer)
        got = "traced by jit" if traced else repr(value)
        remedy = f'Mark it static: jax.jit(..., static_argnames="{name}").' if traced else ""
        raise TypeError(f"{called}: {name} is {got}, expected True or False. {remedy}".rstrip())
    return bool(value)


def mode(
    called: str, train: bool | None, built_with: bool | None, use_running_average: bool | None
) -> bool:
    """The switch has two names and two places; exactly one is given. Returns `train`."""
    given = {
        "train (at call)": train,
        "use_running_average (at construction)": built_with,
        "use_running_average (at call)": use_running_average,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        both = " and ".join(f"{name} = {value}" for name, value in given.items())
        raise ValueError(
            f"{called}: got {both}, which are one switch (train = not use_running_average), "
            "expected it once. Give one of them."
        )
    if not given:
        raise ValueError(
            f"{called}: no mode was given, neither at construction nor at call time. Pass "
            "train=True to normalize by the batch and move the running statistics, or train=False "
            "to normalize by the running statistics."
        )
    ((name, value),) = given.items()
    decided = switch(called, name.split()[0], value)
    return decided if train is not None else not decided


def entries(called: str, shape: tuple[int, ...], reduced: tuple[int, ...], shared: int) -> None:
    """Training needs at least two values for each feature, counted over all devices."""
    local = prod(shape[a] for a in reduced)
    # A symbolic size, as in an export for any batch, is not known to be too small.
    if not isinstance(local, int) or local * shared > 1:
        return
    where = f"over the axes {reduced}{f' of {shared} devices' if shared > 1 else ''}"
    reason = ", since one value normalizes to 0 whatever it is" if local else ""
    raise ValueError(
        f"{called}: x with shape {shape} has {'one' if local else 'no'} value for each feature "
        f"{where}, expected at least two with train=True{reason}. Use a larger batch, share "
        "statistics over devices with axis_name, or pass train=False."
    )


def batch_stats(called: str, given: object, kind: type) -> None:
    """Statistics are read by name, never by position."""
    if not isinstance(given, kind):
        raise TypeError(
            f"{called}: stats is {type(given).__name__}, expected BatchStats or None. Make it by "
            'BatchStats.make(features), or from Flax by BatchStats(**variables["batch_stats"]).'
        )


def features(called: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The one shape of moments to be merged; () stands for any."""
    found = {shape for shape in shapes if shape}
    if len(found) > 1:
        raise ValueError(
            f"{called}: got moments of the shapes {sorted(found)}, expected equal ones. Measure "
            "all pieces over the same features."
        )
    return found.pop() if found else ()


def count(called: str, given: Array | None, momentum: ArrayLike | None, debias: bool) -> None:
    """Averages over all batches need to know how many there were."""
    if given is None and (momentum is None or debias):
        asked = "momentum=None" if momentum is None else "debias=True"
        raise ValueError(
            f"{called}: {asked} needs stats.count, the number of batches taken in, and got None. "
            "Start from BatchStats.make(features, counted=True)."
        )


def stored_count(called: str, held: bool) -> None:
    """A missing count taken as 0 would throw away the statistics that were loaded."""
    if not held:
        raise ValueError(
            f"{called}: momentum=None and debias=True need batch_stats/count, and the variables "
            "have mean and var alone, as Flax writes them. Add count, of the shape of mean, with "
            "the number of batches that they have seen; or use a momentum without debias."
        )


@contextmanager
def collectives(
    called: str,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> Iterator[None]:
    """Words what JAX raises when it cannot reduce over `axis_name`."""
    try:
        yield
    except NameError:
        raise NameError(
            f"{called}: axis_name={axis_name!r} is not bound here; bound are: {_bound_names()}. "
            "Bind it with jax.pmap, jax.shard_map or jax.vmap(..., axis_name=). Under plain jit "
            "over sharded arrays pass axis_name=None: jit reduces over the whole batch by itself."
        ) from None
    except NotImplementedError:
        raise NotImplementedError(
            f"{called}: axis_index_groups={axis_index_groups!r} is not implemented in JAX for the "
            f"way in which axis_name={axis_name!r} is bound. Use jax.pmap, or bind two axes "
            "(groups, members of a group) and pass the members' name as axis_name."
        ) from None


def axis_size(
    called: str,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> int:
    """How many devices share statistics at least; a number, not an operation."""
    with collectives(called, axis_name, axis_index_groups):
        whole = lax.psum(1, axis_name)
    return min(map(len, axis_index_groups)) if axis_index_groups else whole


def groups(called: str, axis_name: object, axis_index_groups: object) -> None:
    """Groups are groups of an axis."""
    if axis_name is None and axis_index_groups is not None:
        raise ValueError(
            f"{called}: axis_index_groups={axis_index_groups!r} without an axis_name, expected "
            "both or neither. Pass the name of the axis whose devices are grouped."
        )


def _bound_names() -> str:
    # JAX has one way of asking, and moved it from jax.core to jax.extend.core.
    for room in (jax.extend.core, jax.core):
        if ask := getattr(room, "unsafe_get_axis_names_DO_NOT_USE", None):
            return ", ".join(map(repr, ask())) or "none"
    return "unknown"
