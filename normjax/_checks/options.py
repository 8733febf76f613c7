"""Errors of options: numbers out of range, modes given twice or not at all, missing counts."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def _number(called: str, name: str, value: Any, expected: str) -> float | None:
    """A number as a float; None for a traced one, which is taken on trust."""
    kinds = (int, float, np.integer, np.floating, np.ndarray, jax.Array)
    if not isinstance(value, kinds) or np.ndim(value) or np.iscomplexobj(value):
        got = f"an array of shape {np.shape(value)}" if np.ndim(value) else repr(value)
        raise TypeError(f"{called}: {name} is {got}, expected {expected}.")
    return None if isinstance(value, jax.core.Tracer) else float(value)


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
    if number is not None and not 0 < number < float("inf"):
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


def batch_stats(called: str, given: object, kind: type, expected: str) -> None:
    """Statistics are read by name, never by position."""
    if not isinstance(given, kind):
        raise TypeError(
            f"{called}: stats is {type(given).__name__}, expected {expected}. Make it by "
            'BatchStats.make(features), or from Flax by BatchStats(**variables["batch_stats"]).'
        )


def moments(called: str, given: object, kind: type) -> None:
    """Moments are more than a mean and a variance: without a count they do not merge."""
    if not isinstance(given, kind):
        raise TypeError(
            f"{called}: moments is {type(given).__name__}, expected Moments. Make it by "
            "normjax.measure(x, axis), and merge pieces by normjax.merge."
        )


def same_shape(called: str, stats: Any, moments: Any) -> None:
    """Running statistics move by the moments of their own features."""
    got, expected = np.shape(moments.mean), np.shape(stats.mean)
    if got != expected:
        raise ValueError(
            f"{called}: moments.mean has shape {got}, expected {expected}, that of stats.mean. "
            "Measure over all axes but those of the features, or start from "
            f"BatchStats.make({got})."
        )


def running_layer(called: str, path: str, found: bool) -> None:
    """What was kept in one tree has its place in the other."""
    if not found:
        raise ValueError(
            f"{called}: batch_moments has an entry at '{path or '/'}', and batch_stats has no "
            "running mean and variance there. Pass both collections of one model, whole."
        )


def some_layer(called: str, layers: dict[str, Any], given: list[str]) -> None:
    """A tree without a batch norm is most likely the wrong tree."""
    if not layers:
        raise ValueError(
            f"{called}: no running mean and variance in batch_stats with the entries {given}. "
            'Pass variables["batch_stats"].'
        )


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


def bound(called: str, name: str, given: Any, smallest: float, count: Array | None) -> ArrayLike:
    """A bound of batch renormalization, or what its schedule says for the steps taken."""
    if callable(given):
        if count is None:
            raise ValueError(
                f"{called}: {name} is a schedule, which needs stats.count, the steps taken, and "
                "got None. Start from BatchStats.make(features, counted=True)."
            )
        return given(count)
    expected = f"a number of at least {smallest} or a schedule"
    number = _number(called, name, given, expected)
    if number is not None and not smallest <= number:
        raise ValueError(f"{called}: {name}={given}, expected {expected}. Ioffe has 3 and 5.")
    return given


def virtual_batches(
    called: str, size: int | None, shape: tuple[int, ...], reduced: tuple[int, ...]
) -> int | None:
    """How many virtual batches the examples along axis 0 are cut into."""
    if size is None:
        return None
    whole = isinstance(size, (int, np.integer)) and size > 0 and shape[0] > 0
    if 0 not in reduced or not whole or shape[0] % size:
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
