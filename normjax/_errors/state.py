"""Errors of state: running statistics, moments, counts, and the collections that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normjax._errors.arrays import as_array, expect_kind, expect_shape, inexact


def batch_stats(given: Any, kind: Any, expected: str) -> None:
    """Statistics are read by name, never by position."""
    remedy = 'from Flax by BatchStats(**variables["batch_stats"]).'
    expected = f"{expected}. Make it by BatchStats.make(features), or {remedy}"
    expect_kind("stats", given, kind, expected)
    _arrays("stats", {"mean": given.mean, "var": given.var}, jnp.inexact)
    if given.count is None:
        return
    array = as_array("stats.count", given.count, "an array of whole numbers")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        array = inexact("stats.count", array, real=True)
    remedy = "Give each feature its count: jnp.full_like(stats.mean, n, jnp.int32)."
    rest = f", that of stats.mean. {remedy}"
    expect_shape("stats.count", array.shape, np.shape(given.mean), rest)


def _arrays(name: str, leaves: dict[str, Any], kind: Any) -> None:
    """Expects arrays of numbers."""
    for field, leaf in leaves.items():
        array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        if not array or not jnp.issubdtype(leaf.dtype, kind):
            got = f"has dtype {leaf.dtype}" if array else f"is {type(leaf).__name__}"
            raise TypeError(
                f"normjax: {name}.{field} {got}, expected an array of floating numbers. "
                f"Convert it first: jnp.asarray({name}.{field}, jnp.float32)."
            )


def moments(given: Any, kind: Any) -> None:
    """Expects `Moments`: a mean and a variance without a count do not merge."""
    remedy = "Make it by normjax.measure(x, axis), and merge pieces by normjax.merge."
    expect_kind("moments", given, kind, f"Moments. {remedy}")
    # Moments(0, 0, 0) is the neutral element for any features, and counts may be whole numbers.
    leaves = given._asdict().items()
    arrays = {name: leaf for name, leaf in leaves if type(leaf) not in (int, float)}
    _arrays("moments", arrays, jnp.number)


def same_shape(stats: Any, moments: Any) -> None:
    """Running statistics and moments have the same features."""
    got, expected = np.shape(moments.mean), np.shape(stats.mean)
    remedy = "Measure over all axes but those of the features, or start from BatchStats.make"
    expect_shape("moments.mean", got, expected, f", that of stats.mean. {remedy}({got}).")


def collection(name: str, given: object) -> None:
    """A collection of variables is a tree of dictionaries."""
    remedy = f'Pass variables["{name.split("/")[0]}"], whole.'
    expect_kind(name, given, Mapping, f"a dictionary. {remedy}")


def running_layer(path: str, found: bool) -> None:
    """Each entry of batch_moments has running statistics in batch_stats."""
    if not found:
        raise ValueError(
            f"normjax: batch_moments has an entry at '{path or '/'}', and batch_stats has no "
            "running mean and variance there. Pass both collections of one model, whole."
        )


def some_layer(layers: dict[str, Any], given: list[str]) -> None:
    """A tree without a batch norm is most likely the wrong tree."""
    if not layers:
        raise ValueError(
            f"normjax: no running mean and variance in batch_stats with the entries {given}. "
            'Pass variables["batch_stats"].'
        )


def count(given: Array | None, momentum: ArrayLike | None, debias: bool) -> None:
    """An average over all batches needs their number."""
    if given is None and (momentum is None or debias):
        asked = "momentum=None" if momentum is None else "debias=True"
        raise ValueError(
            f"normjax: {asked} needs stats.count, the number of batches so far, and got None. "
            "Start from BatchStats.make(features, counted=True)."
        )


def stored_count(held: bool) -> None:
    """A missing count is not read as 0, which would discard the loaded statistics."""
    if not held:
        raise ValueError(
            "normjax: momentum=None and debias=True need batch_stats/count, and the variables "
            "have only mean and var, as in Flax. Add count, of the shape of mean, with the number "
            "of batches so far; or use a momentum without debias."
        )
