"""Running statistics and their update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._core.dtypes import accumulation_dtype, real_dtype
from normjax._core.moments import Moments

# BatchStats for BatchStats, None for None.
Stats = TypeVar("Stats", bound="BatchStats | None")


class BatchStats(NamedTuple):
    """Running statistics of a batch norm, in the layout of Flax's `batch_stats` collection.

    Attributes:
        mean: running mean, float32 or wider, of the shape of the feature axes.
        var: running variance, real, of the same shape.
        count: number of batches that have updated each feature, int32, of the same shape; None
            if it is not needed. `momentum=None` and `debias=True` need it. A floating count, for
            example of a checkpoint or `lax.pmean`, is accepted and keeps its dtype; a float32
            count stops at 2^24.
    """

    mean: Array
    var: Array
    count: Array | None = None  # type: ignore[assignment]  # hides tuple.count, as meant

    @classmethod
    @_errors.named("normjax.BatchStats.make")
    def make(
        cls, shape: int | Sequence[int], dtype: DTypeLike = jnp.float32, *, counted: bool = False
    ) -> BatchStats:
        """Initial statistics: mean 0, variance 1, and count 0 if `counted`.

        The mean has `dtype`, or float32 if that is wider; the variance is real, the count int32.

        Example:
            >>> import normjax
            >>> stats = normjax.BatchStats.make(2)
            >>> stats.mean, stats.var
            (Array([0., 0.], dtype=float32), Array([1., 1.], dtype=float32))
        """
        shape = _errors.shape(shape)
        dtype = accumulation_dtype(_errors.output_dtype(dtype, np.dtype("float32")))
        real = real_dtype(dtype)
        counted = _errors.switch("counted", counted)
        count = jnp.zeros(shape, jnp.int32) if counted else None
        return cls(jnp.zeros(shape, dtype), jnp.ones(shape, real), count)


@_errors.named("normjax.update_stats")
def update_stats(
    stats: BatchStats,
    moments: Moments,
    *,
    momentum: ArrayLike | None = 0.99,
    debias: bool = False,
    ddof: float = 0,
) -> BatchStats:
    """Updates running statistics by the moments of a batch.

        new = (1 - step) old + step batch

    By default step = 1 - momentum. For `momentum=None` it is 1/k at batch k, which gives the plain
    average over all batches. For `debias=True` it is (1 - momentum) / (1 - momentum^k), which
    corrects the exponential average for its initial value; the corrected average is stored.

    `batch_norm(train=True)` includes this update. If a batch comes in several pieces, measure each
    piece, `merge` the moments, and update once.

    Args:
        stats: `BatchStats` of any shape.
        moments: `Moments` of the batch, of the same shape.
        momentum, debias, ddof: as in `batch_norm`; `momentum=None` and `debias=True` need
            `stats.count`.

    Returns:
        `BatchStats` in float32 or wider.

    Guarantees:
        pieces are a whole: an update by the merged moments of pieces equals an update by the
            moments of the concatenated batch, up to rounding.
        statistics stay finite: a feature whose update is not finite keeps its statistics.
        no gradient: none flows through the running statistics.

    Edge cases:
        ===================================  ==================================================
        no degree of freedom                 where count <= ddof, statistics stay unchanged
        a count at the end of its dtype      stays there (2^31 - 1 for int32, as in optax)
        momentum=0                           statistics of the batch
        ===================================  ==================================================

    Raises:
        TypeError: `stats` is not `BatchStats`, or `moments` is not `Moments`.
        ValueError: unequal shapes, an option out of range, or a missing `stats.count`.

    References:
        Ioffe, Szegedy (2015), arXiv:1502.03167; for `debias`, Kingma, Ba (2015),
        arXiv:1412.6980, section 3.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> pieces = jnp.array([[1.0], [3.0]]), jnp.array([[5.0]])
        >>> moments = normjax.merge(*(normjax.measure(piece, axis=0) for piece in pieces))
        >>> normjax.update_stats(normjax.BatchStats.make(1), moments, momentum=0.9).mean
        Array([0.3], dtype=float32)
    """
    _errors.batch_stats(stats, BatchStats, "BatchStats")
    _errors.moments(moments, Moments)
    _errors.momentum(momentum, debias)
    _errors.ddof(ddof)
    _errors.count(stats.count, momentum, debias)
    _errors.same_shape(stats, moments)
    return next_stats(stats, moments, momentum, debias, ddof)


# The name before 0.2, kept until 1.0.
move = update_stats


def next_stats(
    stats: BatchStats, moments: Moments, momentum: ArrayLike | None, debias: bool, ddof: Any
) -> BatchStats:
    """`update_stats` without the checks of its arguments."""
    weights = None
    if momentum is not None:
        step = 1 - momentum
        weights = 1 - step, step
    # A NumPy number would widen the count that it is subtracted from.
    ddof = ddof if isinstance(ddof, jax.core.Tracer) else float(ddof)
    return _next(stats, moments, weights, ddof, debias=bool(debias))


# Compiled, since dispatching each operation from Python takes longer than running it. Momentum is
# an operand: a static one from a schedule would be compiled again for each step.
@partial(jax.jit, static_argnames="debias", inline=True)
def _next(
    stats: BatchStats, moments: Moments, weights: Any, ddof: Any, *, debias: bool
) -> BatchStats:
    """`weights` are those of the old and the batch statistics; None for the plain average."""
    count = stats.count
    if count is not None and jnp.issubdtype(count.dtype, jnp.floating):
        count = count.astype(accumulation_dtype(count.dtype))
    if weights is None or debias:
        assert count is not None, "checked by the caller"
        step = _step(count.astype(accumulation_dtype(stats.var.dtype)), weights)
        weights = 1 - step, step
    mean = _blend(stats.mean, moments.mean, weights)
    var = _blend(stats.var, moments.variance(ddof), weights)
    taken = (moments.count > ddof) & jnp.isfinite(mean) & jnp.isfinite(var)
    return BatchStats(
        _choose(taken, mean, stats.mean),
        _choose(taken, var, stats.var),
        None if count is None else _choose(taken, _incremented(count), count),
    )


def _incremented(count: Array) -> Array:
    if jnp.issubdtype(count.dtype, jnp.floating):
        return count + 1
    return jnp.minimum(count, jnp.iinfo(count.dtype).max - 1) + 1


def _step(count: Array, weights: Any) -> Array:
    """The weight of the batch that follows `count` others."""
    if weights is None:
        return 1 / (count + 1)
    step = jnp.asarray(weights[1]).astype(count.dtype)
    # 1 - momentum^k without cancellation. The first batch has weight 1 exactly: with a rounding
    # error of the ratio, a part of the initial variance would remain.
    # The logarithm is infinite for a step of 1, so the largest number below 1 is used.
    rest = jnp.log1p(-jnp.minimum(step, 1 - jnp.finfo(step.dtype).epsneg))
    return jnp.where(count == 0, 1, step / -jnp.expm1((count + 1) * rest))


def _blend(old: Array, batch: Array, weights: Any) -> Array:
    dtype = accumulation_dtype(old.dtype, batch.dtype)
    keep, step = (jnp.asarray(v).astype(dtype) for v in weights)
    # With weight 0 the old value is dropped, even if it is NaN.
    kept = jnp.where(keep == 0, jnp.zeros((), dtype), old.astype(dtype) * keep)
    return batch.astype(dtype) * step + kept


def _choose(taken: Any, new: Array, old: Array) -> Array:
    old = old.astype(new.dtype)
    if len({jax.typeof(v).update(dtype=new.dtype, weak_type=False) for v in (taken, new, old)}) > 1:
        # jnp.where rejects arrays of different shardings. Adding zeros gives all of them the
        # sharding of the batch statistics.
        old, new = (v + jnp.zeros_like(taken, new.dtype) for v in (old, new))
    return lax.stop_gradient(jnp.where(taken, new, old))
