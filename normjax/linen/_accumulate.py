"""Moments of micro-batches: their initial value, and the update of the running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.typing import ArrayLike

from normjax import _errors
from normjax._core.moments import Moments
from normjax._stats import BatchStats, update_stats


@_errors.named("normjax.linen.empty_batch_moments")
def empty_batch_moments(batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """The initial collection `batch_moments` of a model.

        count = 0,   mean = 0,   m2 = 0

    for each layer that has a running mean and variance. Use it as the initial carry of a
    `jax.lax.scan` over micro-batches.

    Args:
        batch_stats: the collection of that name.

    Returns:
        The same tree with one leaf `moments`, a `Moments`, in place of each `mean` and `var`.

    Guarantees:
        neutral: starting from it or without the collection gives the same result.

    Raises:
        ValueError: no layer has a running mean and variance.

    References:
        Chan, Golub, LeVeque (1983), whose merge has this neutral element.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> stats = {"BatchNorm_0": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
        >>> normjax.linen.empty_batch_moments(stats)["BatchNorm_0"]["moments"].count
        Array([0., 0.], dtype=float32)
    """
    _errors.collection("batch_stats", batch_stats)
    empty = _empty(batch_stats)
    _errors.some_layer(empty, list(batch_stats))
    return empty


@_errors.named("normjax.linen.move_batch_stats")
def move_batch_stats(
    batch_stats: Mapping[str, Any],
    batch_moments: Mapping[str, Any],
    *,
    momentum: ArrayLike | None,
    debias: bool = False,
    ddof: float = 0,
) -> dict[str, Any]:
    """Updates the running statistics of a model once, by the moments that it kept.

    Applies `normjax.update_stats` to each layer. Call it after a `jax.lax.scan` over all
    micro-batches. It is not needed if the last micro-batch is applied with both collections
    mutable.

    Args:
        batch_stats, batch_moments: the collections of these names.
        momentum, debias, ddof: those of the modules.

    Returns:
        The collection `batch_stats`. Layers without kept moments do not change.

    Guarantees:
        once: equal to applying the last micro-batch with both collections mutable.

    Raises:
        ValueError: kept moments of a layer that has no running mean and variance; whatever
            `normjax.update_stats` raises.

    References:
        As in `normjax.update_stats`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> model = normjax.linen.BatchNorm(momentum=0.9)
        >>> variables = model.init(jax.random.key(0), jnp.ones((2, 1)), train=True)
        >>> for piece in jnp.array([[[1.0], [3.0]], [[3.0], [5.0]]]):
        ...     _, kept = model.apply(variables, piece, train=True, mutable=["batch_moments"])
        ...     variables = {**variables, **kept}
        >>> normjax.linen.move_batch_stats(
        ...     variables["batch_stats"], variables["batch_moments"], momentum=0.9
        ... )["mean"]
        Array([0.3], dtype=float32)
    """
    _errors.collection("batch_stats", batch_stats)
    _errors.momentum(momentum, debias)
    options: dict[str, Any] = dict(momentum=momentum, debias=debias, ddof=_errors.ddof(ddof))
    return _move(batch_stats, batch_moments, "", options)


def _empty(tree: Mapping[str, Any]) -> dict[str, Any]:
    if _is_layer(tree):
        return {"moments": Moments.make(tree["mean"].shape, tree["mean"].dtype)}
    below = {name: _empty(leaf) for name, leaf in tree.items() if isinstance(leaf, Mapping)}
    return {name: leaf for name, leaf in below.items() if leaf}


def _move(
    stats: Mapping[str, Any], moments: Mapping[str, Any], path: str, options: dict[str, Any]
) -> dict[str, Any]:
    _errors.collection(f"batch_moments{path}", moments)
    if isinstance(moments.get("moments"), Moments):
        _errors.running_layer(path, _is_layer(stats))
        moved = update_stats(BatchStats(**stats), moments["moments"], **options)
        return {name: leaf for name, leaf in moved._asdict().items() if leaf is not None}
    for name in moments:
        _errors.running_layer(f"{path}/{name}", isinstance(stats.get(name), Mapping))
    return {
        name: _move(leaf, moments[name], f"{path}/{name}", options) if name in moments else leaf
        for name, leaf in stats.items()
    }


def _is_layer(tree: Mapping[str, Any]) -> bool:
    return "mean" in tree and "var" in tree
