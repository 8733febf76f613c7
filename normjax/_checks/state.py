"""Errors of state: running statistics, moments, counts, and the collections that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normjax._checks.arrays import as_array, inexact


def batch_stats(called: str, given: Any, kind: Any, expected: str) -> None:
    """Statistics are read by name, never by position."""
    if not isinstance(given, kind):
        raise TypeError(
            f"{called}: stats is {type(given).__name__}, expected {expected}. Make it by "
            'BatchStats.make(features), or from Flax by BatchStats(**variables["batch_stats"]).'
        )
    _arrays(called, "stats", {"mean": given.mean, "var": given.var}, jnp.inexact)
    if given.count is not None:
        _count_vector(called, given.count, np.shape(given.mean))


def _count_vector(called: str, value: ArrayLike, expected: tuple[int, ...]) -> None:
    """How many batches each feature has taken in: whole numbers, in any real dtype."""
    array = as_array(called, "stats.count", value, "an array of whole numbers")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        array = inexact(called, "stats.count", array, real=True)
    if array.shape != expected:
        raise ValueError(
            f"{called}: stats.count has shape {array.shape}, expected {expected}, that of "
            "stats.mean. Give each feature its count: jnp.full_like(stats.mean, n, jnp.int32)."
        )


def _arrays(called: str, name: str, leaves: dict[str, Any], kind: Any) -> None:
    """What is averaged is read from arrays of numbers."""
    for field, leaf in leaves.items():
        array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        if not array or not jnp.issubdtype(leaf.dtype, kind):
            got = f"has dtype {leaf.dtype}" if array else f"is {type(leaf).__name__}"
            raise TypeError(
                f"{called}: {name}.{field} {got}, expected an array of floating numbers. "
                f"Convert it first: jnp.asarray({name}.{field}, jnp.float32)."
            )


def moments(called: str, given: Any, kind: Any) -> None:
    """Moments are more than a mean and a variance: without a count they do not merge."""
    if not isinstance(given, kind):
        raise TypeError(
            f"{called}: moments is {type(given).__name__}, expected Moments. Make it by "
            "normjax.measure(x, axis), and merge pieces by normjax.merge."
        )
    # Moments(0, 0, 0) is the neutral element for any features, and counts may be whole numbers.
    leaves = given._asdict().items()
    arrays = {name: leaf for name, leaf in leaves if type(leaf) not in (int, float)}
    _arrays(called, "moments", arrays, jnp.number)


def same_shape(called: str, stats: Any, moments: Any) -> None:
    """Running statistics move by the moments of their own features."""
    got, expected = np.shape(moments.mean), np.shape(stats.mean)
    if got != expected:
        raise ValueError(
            f"{called}: moments.mean has shape {got}, expected {expected}, that of stats.mean. "
            "Measure over all axes but those of the features, or start from "
            f"BatchStats.make({got})."
        )


def collection(called: str, name: str, given: object) -> None:
    """A collection of variables is a tree of dictionaries."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{called}: {name} is {type(given).__name__}, expected a dictionary. Pass "
            f'variables["{name.split("/")[0]}"], whole.'
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
