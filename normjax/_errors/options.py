"""Errors of options: numbers out of range, modes given twice or not at all, missing counts."""

from __future__ import annotations

import sys
from collections.abc import Collection, Hashable, Sequence
from math import inf, prod, ulp
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normjax._errors.arrays import Shape, fits, whole

# The largest number that is finite, and the smallest one above 0.
MAX, LEAST = sys.float_info.max, ulp(0.0)


def number(
    name: str, value: Any, expected: str, least: float = -MAX, most: float = MAX, remedy: str = "."
) -> Any:
    """A real number from `least` to `most`, as a Python float; a traced one is not checked."""
    # type(), since isinstance accepts a bool as an int.
    if type(value) not in (int, float):
        is_array = isinstance(value, (np.integer, np.floating, np.ndarray, jax.Array))
        if not is_array or np.ndim(value) or not _is_real(value.dtype):
            got = _shown(value) if is_array else repr(value)
            raise TypeError(f"normjax: {name} is {got}, expected {expected}.")
        if isinstance(value, jax.core.Tracer):
            return value
    found = float(value)
    if not least <= found <= most:
        raise ValueError(f"normjax: {name}={value}, expected {expected}{remedy}")
    return found


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def _shown(value: object) -> str:
    """A value in a message; an array by its shape."""
    shape = getattr(value, "shape", ())
    return f"an array of shape {shape}" if shape else repr(value)


def finite(name: str, value: Any) -> Any:
    """A number of a formula."""
    return number(name, value, "a finite number")


def positive(name: str, value: Any) -> Any:
    """A number above 0, which keeps a divisor away from zero."""
    finite(name, value)
    return number(name, value, "a number above 0", LEAST, remedy=", or zeros divide by zero.")


def epsilon(value: ArrayLike) -> None:
    """A number that is added to the variance; zero is allowed."""
    expected = "a finite number of at least 0, which is added to the variance"
    number("epsilon", value, expected, 0, remedy=", for example 1e-5.")


def slope(name: str, value: float) -> None:
    """The slope of an activation below zero; a Python number, since activations are hashed."""
    expected = "a finite number above 0"
    if not isinstance(number(name, value, expected, LEAST), float):
        raise ValueError(f"normjax: {name}={value}, expected {expected}.")


def activation(value: Any) -> None:
    """An elementwise function; it is checked for a single number."""
    if not (isinstance(value, Hashable) and callable(value)):
        raise TypeError(
            f"normjax: activation={value!r}, expected a hashable function, for example "
            "normjax.LeakyReLU() or jax.nn.gelu."
        )
    number = jax.ShapeDtypeStruct((), np.float32)
    try:
        result = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(value, number))
    except Exception as error:
        raise TypeError(
            f"normjax: activation={value!r} fails for a single number, expected an elementwise "
            f"function such as jax.nn.gelu: {error}"
        ) from error
    if result != (number.shape, number.dtype):
        raise TypeError(
            f"normjax: activation={value!r} returns (shape, dtype) {result} for a float32 "
            "number, expected a float32 number. Pass an elementwise function such as jax.nn.gelu."
        )


def momentum(value: ArrayLike | None, debias: bool) -> None:
    """The weight of the old value; None asks for the plain average."""
    switch("debias", debias)
    if value is None:
        return
    found = number(
        "momentum", value, "a number from 0 to 1, the weight of the OLD running value", 0, 1,
        " (PyTorch's momentum m is 1 - m here), or None for the plain average over all batches.",
    )  # fmt: skip
    if debias and isinstance(found, float) and found == 1:
        raise ValueError(
            "normjax: momentum=1 with debias=True never updates the statistics, so there is "
            "nothing to correct. Pass momentum=None for the plain average over all batches."
        )


def ddof(value: Any, shape: Shape = ()) -> Any:
    """The correction of the running variance; also one for each feature, given their `shape`."""
    if shape and isinstance(value, jax.Array) and value.ndim and fits(value.shape, shape):
        return value
    expected = (
        "a number of at least 0: 0 for the biased running variance (Flax, the paper), 1 for the "
        "unbiased one (PyTorch)"
    )
    return number("ddof", value, expected, 0)


def switch(name: str, value: object) -> bool:
    """A mode is decided while tracing, so it cannot be a traced value."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, jax.core.Tracer):
        remedy = f'Mark it static: jax.jit(..., static_argnames="{name}").'
        raise TypeError(f"normjax: {name} is traced by jit, expected True or False. {remedy}")
    raise TypeError(f"normjax: {name} is {_shown(value)}, expected True or False.")


class Mode(NamedTuple):
    """Whether a module trains, how the caller asked for it, and how to ask for the other mode."""

    train: bool
    asked: str
    instead: str


_BY_POSITION = (
    "A mode passed by position is use_running_average, as in Flax, the opposite of train: name it, "
    "train=... or use_running_average=..."
)


def mode(train: bool | None, built_with: bool | None, use_running_average: bool | None) -> Mode:
    """The mode can be given by two names, in two places; exactly one is given."""
    name = "use_running_average"
    places = {
        "train (at call)": train,
        f"{name} (at construction)": built_with,
        f"{name} (at call)": use_running_average,
    }
    given = {place: value for place, value in places.items() if value is not None}
    if len(given) > 1:
        both = " and ".join(f"{place} = {value}" for place, value in given.items())
        passed = "was passed to the constructor and at call time. Should be passed just once."
        twice = f'Parameter "{name}" {passed} ' if train is None else ""
        raise ValueError(
            f"normjax: {twice}Got {both}, which are one switch (train = not {name}), expected it "
            f"once. Give one of them. {_BY_POSITION}"
        )
    if not given:
        raise ValueError(
            f'normjax: no mode was given. Parameter "{name}" must be passed to the constructor or '
            "at call time. Pass train=True to normalize by the batch and update the running "
            f"statistics, or train=False to normalize by the running statistics. {_BY_POSITION}"
        )
    ((place, value),) = given.items()
    argument = place.split()[0]
    decided = switch(argument, value)
    asked, instead = f"{argument}={decided}", f"pass {argument}={not decided}."
    if use_running_average is not None:
        instead += f" {_BY_POSITION}"
    if built_with is not None:
        asked, instead = f"{asked} (at construction)", f"construct it with {instead[5:]}"
    return Mode(decided if train is not None else not decided, asked, instead)


_TRAIN = Mode(True, "train=True", "pass train=False.")


def entries(shape: Shape, reduced: Shape, shared: int, mode: Mode = _TRAIN) -> None:
    """Training needs at least two values for each feature, counted over all devices."""
    local = prod([shape[a] for a in reduced])
    # A symbolic size, as in an export for any batch, is not known to be too small.
    if not isinstance(local, int) or local * shared > 1:
        return
    found = "one" if local else "no"
    devices = f" of {shared} devices" if shared > 1 else ""
    reason = ", since a single value always normalizes to 0" if local else ""
    along = "" if reduced else ", along a leading batch axis"
    raise ValueError(
        f"normjax: x with shape {shape} has {found} value for each feature over the axes "
        f"{reduced}{devices}, expected at least two with {mode.asked}{reason}. Use a larger batch"
        f"{along}, share statistics over devices with axis_name, or {mode.instead}"
    )


def initializer(name: str, value: object) -> None:
    """The initializer of a parameter."""
    if not callable(value):
        raise TypeError(
            f"normjax: {name}={value!r}, expected an initializer, a function of key, shape and "
            "dtype. Pass for example jax.nn.initializers.ones, or constant(value) of that module."
        )


def layer(value: object, kind: type, framework: str, example: str) -> None:
    """A wrapper needs a layer."""
    if not isinstance(value, kind):
        got = value.__name__ if isinstance(value, type) else type(value).__name__
        raise TypeError(
            f"normjax: layer_instance is {got}, expected an instance of a {framework} module. "
            f"Pass the layer whose weights are normalized, for example {example}."
        )


def variable_names(value: Any) -> None:
    """Names of variables. A string, which is a collection of letters, is rejected."""
    named = isinstance(value, Collection) and not isinstance(value, (str, np.ndarray, jax.Array))
    if value is not None and not (named and all(isinstance(name, str) for name in value)):
        names = f"{{{value!r}}}" if isinstance(value, str) else 'for example {"kernel"}'
        raise TypeError(
            f"normjax: variable_filter={value!r}, expected a collection of names, or None for all "
            f"variables. Pass {names}."
        )


def steps(value: Any) -> int:
    """Steps of the power iteration around a layer; 0 is allowed, as in Flax."""
    return whole("n_steps", value, "a whole number, for example 1.")


def text(name: str, value: object) -> None:
    """A name."""
    if not isinstance(value, str):
        raise TypeError(f"normjax: {name}={value!r}, expected a name in quotes.")


def bound(name: str, given: Any, smallest: float, stats: Any) -> Array | np.ndarray | float:
    """A bound of batch renormalization; a schedule is called with the number of updates."""
    if not callable(given):
        expected = f"a number of at least {smallest} or a schedule"
        return number(name, given, expected, smallest, inf, ". Ioffe has 3 and 5.")
    if stats.count is None:
        raise ValueError(
            f"normjax: {name} is a schedule, which needs stats.count, the number of updates, and "
            "got None. Start from BatchStats.make(features, counted=True)."
        )
    found, shape = given(stats.count), np.shape(stats.mean)
    what = f"normjax: the schedule {name} returned"
    expected = f"a number of at least {smallest}, or one for each feature of shape {shape}"
    try:
        array = jnp.asarray(found)
        real = _is_real(array.dtype)
    except (TypeError, ValueError):
        real = False
    if not real:
        got = type(found).__name__ if np.ndim(found) == 0 else "no real array"
        raise TypeError(f"{what} {got}, expected {expected}.")
    if array.shape not in ((), shape):
        raise ValueError(f"{what} an array of shape {array.shape}, expected {expected}.")
    # A result that depends on a traced count has no value yet.
    if not isinstance(found, jax.core.Tracer) and not np.all(np.asarray(found) >= smallest):
        raise ValueError(f"{what} {np.asarray(found).tolist()}, expected {expected}.")
    return array


def virtual_batches(size: int | None, shape: Shape, reduced: Shape) -> int | None:
    """How many virtual batches the examples along axis 0 are cut into."""
    if size is None:
        return None
    whole = isinstance(size, (int, np.integer)) and size > 0 and 0 in reduced and shape[0] > 0
    if not whole or shape[0] % size:
        raise ValueError(
            f"normjax: virtual_batch_size={size} for x with shape {shape}, expected a divisor of "
            "the number of examples, which lie along axis 0. Cut or pad the batch to a multiple."
        )
    return shape[0] // int(size)


def moves(train: bool | None, update_stats: bool | None) -> bool:
    """Whether to update: `update_stats` if it is given, else `train`."""
    if update_stats is not None:
        return switch("update_stats", update_stats)
    if train is not None:
        return switch("train", train)
    raise ValueError(
        "normjax: neither train nor update_stats was given, expected one. Pass train=True to "
        "update the power iteration, or train=False."
    )


def only_matrix(subject: str, path: str, shape: Shape) -> None:
    """Checks the rank for error_on_non_matrix; `subject` is Flax's wording."""
    if len(shape) > 2:
        raise ValueError(
            f"normjax: {subject} is {len(shape)}D but error_on_non_matrix is True: {path} has "
            f"shape {shape}. Pass error_on_non_matrix=False to take its last axis as the features."
        )


def known(name: str, value: Any, names: Sequence[str]) -> None:
    """One of a few names."""
    if value not in names:
        listed = ", ".join(map(repr, names))
        raise ValueError(f"normjax: {name}={value!r}, expected one of {listed}.")


def at_least_one(name: str, value: Any) -> int:
    """A number of at least 1."""
    expected = "a whole number of at least 1."
    count = whole(name, value, expected)
    if count < 1:
        raise ValueError(f"normjax: {name}={value!r}, expected {expected}")
    return count
