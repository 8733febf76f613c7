"""Running statistics: what they are and how they move by one step."""

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

# Statistics come out where they went in, and None where there were none.
Stats = TypeVar("Stats", bound="BatchStats | None")


class BatchStats(NamedTuple):
    """Running statistics of a batch norm, in the layout of Flax's `batch_stats` collection.

    Attributes:
        mean: running mean, float32 or wider, of the shape of the feature axes.
        var: running variance, real, of the same shape.
        count: how many batches each feature has taken in, int32, of the same shape; None where
            no count is needed. `momentum=None` and `debias=True` need it. A count of floating
            numbers, as a checkpoint or `lax.pmean` may give it, is taken as well and keeps its
            dtype; one of float32 stops at 2^24.
    """

    mean: Array
    var: Array
    count: Array | None = None  # type: ignore[assignment]  # hides tuple.count, as meant

    @classmethod
    @_errors.named("normjax.BatchStats.make")
    def make(
        cls, shape: int | Sequence[int], dtype: DTypeLike = jnp.float32, *, counted: bool = False
    ) -> BatchStats:
        """Statistics that have seen nothing yet: mean 0, variance 1, and count 0 if `counted`.

        Of `dtype`, or of float32 if that is narrower; the variance is real, the count int32.

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
    """One step of the running statistics towards the moments of a batch.

        new = (1 - step) old + step batch

    with step = 1 - momentum; 1/k at batch k for `momentum=None`, which is the plain average over
    all batches; (1 - momentum) / (1 - momentum^k) for `debias=True`, which is the exponential
    average corrected for its start and stored corrected, so that whoever reads the statistics
    needs to know nothing about it.

    `batch_norm(train=True)` does this by itself. Where a batch comes in several pieces, measure
    each, `merge` the moments, and update once.

    Args:
        stats: `BatchStats` of any shape.
        moments: `Moments` of the batch, of the same shape.
        momentum, debias, ddof: as in `batch_norm`; `momentum=None` and `debias=True` need
            `stats.count`.

    Returns:
        `BatchStats` in float32 or wider.

    Guarantees:
        pieces are a whole: moving by the merged moments of pieces equals moving by those of the
            concatenated batch, to rounding.
        statistics stay finite: a non-finite step is not taken, for the feature concerned.
        no gradient: none flows through the running statistics.

    Edge cases:
        ===================================  ==================================================
        no degree of freedom                 where count <= ddof, the statistics stay
        a count at the end of its dtype      stays there (2^31 - 1 for int32, as in optax)
        momentum=0                           statistics of the batch, whatever was there before
        ===================================  ==================================================

    Raises:
        TypeError: `stats` are no `BatchStats`, or `moments` no `Moments`.
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
    """`update_stats` of what was checked."""
    weights = None
    if momentum is not None:
        step = 1 - momentum
        weights = 1 - step, step
    # A NumPy number would widen what it is subtracted from.
    ddof = ddof if isinstance(ddof, jax.core.Tracer) else float(ddof)
    return _next(stats, moments, weights, ddof, debias=bool(debias))


# Compiled, since Python takes longer for each of these operations than the device. Momentum is an
# operand: that of a schedule would be compiled again for each step.
@partial(jax.jit, static_argnames="debias", inline=True)
def _next(
    stats: BatchStats, moments: Moments, weights: Any, ddof: Any, *, debias: bool
) -> BatchStats:
    """By the weights of the old and of the batch; None for those of the plain average."""
    count = stats.count
    if count is not None and jnp.issubdtype(count.dtype, jnp.floating):
        count = count.astype(accumulation_dtype(count.dtype))
    if weights is None or debias:
        assert count is not None, "checked at the door"
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
    """The weight of the batch after `count` others."""
    if weights is None:
        return 1 / (count + 1)
    step = jnp.asarray(weights[1]).astype(count.dtype)
    # 1 - momentum^k without cancellation. The first batch is taken whole: a rounding error of
    # the ratio would leave a trace of the initial variance.
    # A step of 1, for which the logarithm is infinite, has the weight of its neighbor.
    rest = jnp.log1p(-jnp.minimum(step, 1 - jnp.finfo(step.dtype).epsneg))
    return jnp.where(count == 0, 1, step / -jnp.expm1((count + 1) * rest))


def _blend(old: Array, batch: Array, weights: Any) -> Array:
    dtype = accumulation_dtype(old.dtype, batch.dtype)
    keep, step = (jnp.asarray(v).astype(dtype) for v in weights)
    # Nothing of the old is kept where its weight is 0, not even a NaN.
    kept = jnp.where(keep == 0, jnp.zeros((), dtype), old.astype(dtype) * keep)
    return batch.astype(dtype) * step + kept


def _choose(taken: Any, new: Array, old: Array) -> Array:
    old = old.astype(new.dtype)
    if len({jax.typeof(v).update(dtype=new.dtype, weak_type=False) for v in (taken, new, old)}) > 1:
        # There is no selection between arrays that lie differently on the devices. Adding zeros
        # gives old the layout of the batch's statistics.
        old, new = (v + jnp.zeros_like(taken, new.dtype) for v in (old, new))
    return lax.stop_gradient(jnp.where(taken, new, old))
