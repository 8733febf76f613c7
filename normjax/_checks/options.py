"""Errors of options: numbers out of range, modes given twice or not at all, missing counts."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normjax._checks.arrays import fits, whole


def _number(called: str, name: str, value: Any, expected: str) -> float | None:
    """A number as a float; None for a traced one, which is taken on trust."""
    kinds = (np.integer, np.floating, np.ndarray, jax.Array)
    # type() and not isinstance, for which a bool is a whole number.
    if type(value) not in (int, float) and not (
        isinstance(value, kinds) and np.ndim(value) == 0 and _is_real(value.dtype)
    ):
        shaped = isinstance(value, kinds) and np.ndim(value)
        got = f"an array of shape {np.shape(value)}" if shaped else repr(value)
        raise TypeError(f"{called}: {name} is {got}, expected {expected}.")
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def finite(called: str, name: str, value: Any) -> Any:
    """A number of a formula, as Python has it unless it is traced."""
    number = _number(called, name, value, "a finite number")
    if number is not None and not -float("inf") < number < float("inf"):
        raise ValueError(f"{called}: {name}={value}, expected a finite number.")
    return value if number is None else number


def positive(called: str, name: str, value: Any) -> Any:
    """Likewise, for a number that keeps a sum of squares away from zero."""
    number = finite(called, name, value)
    if isinstance(number, float) and number <= 0:
        raise ValueError(
            f"{called}: {name}={value}, expected a number above 0, or zeros divide by zero."
        )
    return number


def epsilon(called: str, value: ArrayLike) -> None:
    """What is added to the variance; zero is allowed."""
    expected = "a finite number of at least 0, which is added to the variance"
    number = _number(called, "epsilon", value, expected)
    if number is not None and not 0 <= number < float("inf"):
        raise ValueError(f"{called}: epsilon={value}, expected {expected}, for example 1e-5.")


def slope(called: str, name: str, value: float) -> None:
    """The size of an activation below zero."""
    expected = "a finite number above 0"
    number = _number(called, name, value, expected)
    if number is None or not 0 < number < float("inf"):
        raise ValueError(f"{called}: {name}={value}, expected {expected}.")


def activation(called: str, value: Any) -> None:
    """A function that maps each entry by itself, which a number stands for here."""
    if not (isinstance(value, Hashable) and callable(value)):
        raise TypeError(
            f"{called}: activation={value!r}, expected a hashable function, for example "
            "normjax.LeakyReLU() or jax.nn.gelu."
        )
    number = jax.ShapeDtypeStruct((), np.float32)
    try:
        result = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(value, number))
    except Exception as error:
        raise TypeError(
            f"{called}: activation={value!r} fails for a single number, expected an elementwise "
            f"function such as jax.nn.gelu: {error}"
        ) from error
    if result != (number.shape, number.dtype):
        raise TypeError(
            f"{called}: activation={value!r} returns (shape, dtype) {result} for a float32 "
            "number, expected a float32 number. Pass an elementwise function such as jax.nn.gelu."
        )


def momentum(called: str, value: ArrayLike | None, debias: bool) -> None:
    """The weight of the old value; None asks for the plain average."""
    switch(called, "debias", debias)
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


def ddof(called: str, value: Any, shape: tuple[int, ...] = ()) -> Any:
    """The correction of the running variance, as a Python number unless it is traced.

    With a shape of features there may be one for each.
    """
    expected = (
        "a number of at least 0: 0 for the biased running variance (Flax, the paper), 1 for the "
        "unbiased one (PyTorch)"
    )
    if shape and isinstance(value, jax.Array) and value.ndim and fits(value.shape, shape):
        return value
    number = _number(called, "ddof", value, expected)
    if number is not None and not 0 <= number < float("inf"):
        raise ValueError(f"{called}: ddof={value}, expected {expected}.")
    return value if number is None else number


def switch(called: str, name: str, value: object) -> bool:
    """A mode is decided while tracing, so it cannot be a traced value."""
    if not isinstance(value, (bool, np.bool_)):
        traced = isinstance(value, jax.core.Tracer)
        got = "traced by jit" if traced else _shown(value)
        remedy = f'Mark it static: jax.jit(..., static_argnames="{name}").' if traced else ""
        raise TypeError(f"{called}: {name} is {got}, expected True or False. {remedy}".rstrip())
    return bool(value)


class Mode(NamedTuple):
    """Whether a module trains, how the caller asked for it, and how to ask for the other mode."""

    train: bool
    asked: str
    instead: str


_BY_POSITION = (
    "A mode passed by position is use_running_average, as in Flax, the opposite of train: name it, "
    "train=... or use_running_average=..."
)


def mode(
    called: str, train: bool | None, built_with: bool | None, use_running_average: bool | None
) -> Mode:
    """The switch has two names and two places; exactly one is given."""
    name = "use_running_average"
    places = {
        "train (at call)": train,
        f"{name} (at construction)": built_with,
        f"{name} (at call)": use_running_average,
    }
    given = {place: value for place, value in places.items() if value is not None}
    if len(given) > 1:
        both = " and ".join(f"{place} = {value}" for place, value in given.items())
        twice = (
            f'Parameter "{name}" was passed to the constructor and at call time. Should be passed '
            "just once. "
            if train is None
            else ""
        )
        raise ValueError(
            f"{called}: {twice}Got {both}, which are one switch (train = not {name}), expected it "
            f"once. Give one of them. {_BY_POSITION}"
        )
    if not given:
        raise ValueError(
            f'{called}: no mode was given. Parameter "{name}" must be passed to the constructor or '
            "at call time. Pass train=True to normalize by the batch and move the running "
            f"statistics, or train=False to normalize by the running statistics. {_BY_POSITION}"
        )
    ((place, value),) = given.items()
    argument = place.split()[0]
    decided = switch(called, argument, value)
    asked, instead = f"{argument}={decided}", f"pass {argument}={not decided}."
    if use_running_average is not None:
        instead += f" {_BY_POSITION}"
    if built_with is not None:
        asked, instead = f"{asked} (at construction)", f"construct it with {instead[5:]}"
    return Mode(decided if train is not None else not decided, asked, instead)


def _shown(value: object) -> str:
    """A value in a message; an array by its shape."""
    shape = getattr(value, "shape", ())
    return f"an array of shape {shape}" if shape else repr(value)


def initializer(called: str, name: str, value: object) -> None:
    """What makes a parameter."""
    if not callable(value):
        raise TypeError(
            f"{called}: {name}={value!r}, expected an initializer, a function of key, shape and "
            "dtype. Pass for example jax.nn.initializers.ones, or constant(value) of that module."
        )


def layer(called: str, value: object, kind: type) -> None:
    """A wrapper has a layer within."""
    if not isinstance(value, kind):
        got = value.__name__ if isinstance(value, type) else type(value).__name__
        raise TypeError(
            f"{called}: layer_instance is {got}, expected an instance of a flax.linen module. Pass "
            "the layer whose weights are normalized, for example nn.Dense(3)."
        )


def variable_names(called: str, value: Any) -> None:
    """Names of variables; a text is a collection too, of its letters."""
    named = isinstance(value, Collection) and not isinstance(value, (str, np.ndarray, jax.Array))
    if value is not None and not (named and all(isinstance(name, str) for name in value)):
        remedy = (
            f"Pass {{{value!r}}}." if isinstance(value, str) else 'Pass for example {"kernel"}.'
        )
        raise TypeError(
            f"{called}: variable_filter={value!r}, expected a collection of names, or None for all "
            f"variables. {remedy}"
        )


def steps(called: str, value: Any) -> int:
    """Steps of the power iteration around a layer; as in Flax none at all are allowed."""
    try:
        return whole(value)
    except TypeError:
        raise TypeError(
            f"{called}: n_steps={value!r}, expected a whole number, for example 1."
        ) from None


def text(called: str, name: str, value: object) -> None:
    """A name."""
    if not isinstance(value, str):
        raise TypeError(f"{called}: {name}={value!r}, expected a name in quotes.")


def bound(
    called: str, name: str, given: Any, smallest: float, stats: Any
) -> Array | np.ndarray | float:
    """A bound of batch renormalization, or what its schedule says for the steps taken."""
    if not callable(given):
        expected = f"a number of at least {smallest} or a schedule"
        number = _number(called, name, given, expected)
        if number is not None and not smallest <= number:
            raise ValueError(f"{called}: {name}={given}, expected {expected}. Ioffe has 3 and 5.")
        return given if number is None else number
    if stats.count is None:
        raise ValueError(
            f"{called}: {name} is a schedule, which needs stats.count, the steps taken, and "
            "got None. Start from BatchStats.make(features, counted=True)."
        )
    found, shape = given(stats.count), np.shape(stats.mean)
    what = f"{called}: the schedule {name} returned"
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
    # What depends on a traced count has no value yet.
    if not isinstance(found, jax.core.Tracer) and not np.all(np.asarray(found) >= smallest):
        raise ValueError(f"{what} {np.asarray(found).tolist()}, expected {expected}.")
    return array


def virtual_batches(
    called: str, size: int | None, shape: tuple[int, ...], reduced: tuple[int, ...]
) -> int | None:
    """How many virtual batches the examples along axis 0 are cut into."""
    if size is None:
        return None
    whole = isinstance(size, (int, np.integer)) and size > 0 and 0 in reduced and shape[0] > 0
    if not whole or shape[0] % size:
        raise ValueError(
            f"{called}: virtual_batch_size={size} for x with shape {shape}, expected a divisor of "
            "the number of examples, which lie along axis 0. Cut or pad the batch to a multiple."
        )
    return shape[0] // int(size)


def moves(called: str, train: bool | None, update_stats: bool | None) -> bool:
    """update_stats is the switch if it is given, train if it is alone."""
    if train is None and update_stats is None:
        raise ValueError(
            f"{called}: neither train nor update_stats was given, expected one. Pass train=True "
            "to move the power iteration, or train=False."
        )
    if update_stats is not None:
        return switch(called, "update_stats", update_stats)
    return switch(called, "train", train)


def only_matrix(called: str, path: str, shape: tuple[int, ...]) -> None:
    """Asked for by error_on_non_matrix."""
    if len(shape) > 2:
        raise ValueError(
            f"{called}: Input is {len(shape)}D but error_on_non_matrix is True: {path} has shape "
            f"{shape}. Pass error_on_non_matrix=False to take its last axis as the features."
        )
