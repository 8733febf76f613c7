"""Moments of micro-batches: their initial value, and the update of the running statistics."""

from __future__ import annotations

from typing import Any

from flax import nnx

from normjax import _errors
from normjax._core.moments import Moments
from normjax._stats import BatchStats, update_stats
from normjax.nnx._batch import BatchMoments, _BatchNorm


@_errors.named("normjax.nnx.empty_batch_moments")
def empty_batch_moments(model: nnx.Module) -> None:
    """Gives each batch norm of a model the initial variable `moments`, in place.

        count = 0,   mean = 0,   m2 = 0

    A layer creates the variable itself in its first call with `accumulate`. Call this function
    before a `nnx.scan` over micro-batches, in which no variable may be created, and in tree mode
    (`nnx.set_graph_mode(False)`), in which a variable created in a transformation is lost.

    Args:
        model: with batch norms of normjax.

    Returns:
        None; each layer has the variable `moments` afterwards.

    Guarantees:
        neutral: starting from them or without the variable gives the same result.

    Raises:
        ValueError: no batch norm of normjax.

    References:
        Chan, Golub, LeVeque (1983), whose merge has this neutral element.

    Example:
        >>> import normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        >>> normjax.nnx.empty_batch_moments(layer)
        >>> layer.moments.get_value().count
        Array([0., 0.], dtype=float32)
    """
    for layer in _layers(model):
        layer.moments = BatchMoments(Moments.make(layer.mean.shape, layer.mean.dtype))


@_errors.named("normjax.nnx.move_batch_stats")
def move_batch_stats(model: nnx.Module) -> None:
    """Updates the running statistics of a model once, by the moments that it kept, in place.

    Applies `normjax.update_stats` to each layer, with its own momentum, debias and ddof, and resets
    the kept moments. Call it after a `nnx.scan` over all micro-batches. It is not needed if the
    last micro-batch runs without `accumulate`.

    Args:
        model: with batch norms of normjax. Layers without kept moments do not change.

    Returns:
        None; the running statistics are updated by the kept moments.

    Guarantees:
        once: equal to running the last micro-batch without `accumulate`.

    Raises:
        ValueError: no batch norm of normjax, or none that kept moments.

    References:
        As in `normjax.update_stats`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.BatchNorm(1, momentum=0.9, accumulate=True, rngs=nnx.Rngs(0))
        >>> for piece in jnp.array([[[1.0], [3.0]], [[3.0], [5.0]]]):
        ...     y = layer(piece)
        >>> normjax.nnx.move_batch_stats(layer)
        >>> layer.mean[...]
        Array([0.3], dtype=float32)
    """
    kept = [layer for layer in _layers(model) if getattr(layer, "moments", None) is not None]
    _errors.some_moments(len(kept))
    for layer in kept:
        fields = [name for name in BatchStats._fields if hasattr(layer, name)]
        stats = BatchStats(**{name: getattr(layer, name)[...] for name in fields})
        options: dict[str, Any] = dict(momentum=layer.momentum, debias=layer.debias)
        moments = layer.moments.get_value()
        moved = update_stats(stats, moments, ddof=layer.ddof, **options)
        for name in fields:
            getattr(layer, name).set_value(getattr(moved, name))
        layer.moments.set_value(Moments.make(moments.mean.shape, moments.mean.dtype))


def _layers(model: nnx.Module) -> list[Any]:
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, _BatchNorm)]
    _errors.some_batch_norm(len(layers), model)
    return layers
