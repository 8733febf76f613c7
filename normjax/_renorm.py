"""Batch renormalization: batch norm corrected towards what evaluation will do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks
from normjax._batch import check, enough, evaluate, normalize_batch, with_kept
from normjax._moments import Moments, measured, synchronize, wide, widened
from normjax._stats import BatchStats, move
from normjax._walks import input_of_norm, moments_of_norm


@_checks.named("normjax.batch_renorm")
def batch_renorm(
    x: ArrayLike,
    stats: BatchStats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    train: bool,
    r_max: ArrayLike | Callable[[Array], ArrayLike] = 3.0,
    d_max: ArrayLike | Callable[[Array], ArrayLike] = 5.0,
    feature_axis: int | Collection[int] = -1,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    ddof: float = 0,
    debias: bool = False,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, BatchStats]:
    """Batch renormalization: batch norm corrected towards what evaluation will do.

        y = ((x - mean) / s * r + d) * scale + bias,   s = sqrt(var + epsilon)
        r = clip(s / running s, 1/r_max, r_max),   d = clip((mean - running mean) / running s,
        -d_max, d_max)

    with mean and var of the batch for `train=True`. For r and d within their bounds y is what the
    running statistics give; for r_max = 1, d_max = 0 it is batch norm. `train=False` is batch
    norm by the running statistics.

    Args:
        x, scale, bias, train, feature_axis, momentum, epsilon, ddof, debias, mask, axis_name,
            axis_index_groups, dtype: as in `batch_norm`.
        stats: `BatchStats` of the shape of the feature axes; r and d need them.
        r_max: at least 1; a number, or a schedule from `stats.count` (steps taken, for each
            feature, in the dtype of the variance) to a number.
        d_max: at least 0; likewise.

    Returns:
        `(y, stats)`, as in `batch_norm`.

    Guarantees:
        no gradient: none flows through r and d, nor through the running statistics.
        shared exactly: equal to one call on the concatenated batch, for any masks.

    Edge cases:
        ===================================  ==================================================
        r_max=1, d_max=0                     batch norm
        bounds never reached                 y by the running statistics, gradients by the batch
        traced bound below its least         taken on trust: r = r_max, d = d_max
        ===================================  ==================================================

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as in `batch_norm`.
        ValueError: r_max below 1, d_max below 0; a schedule and no `stats.count`.

    References:
        Ioffe (2017), Batch Renormalization, arXiv:1702.03275.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> x = jnp.array([[0.0], [4.0]])
        >>> y, stats = normjax.batch_renorm(x, normjax.BatchStats.make(1), train=True)
        >>> y.round(2).ravel()
        Array([0., 4.], dtype=float32)
    """
    y, stats, _ = keeping_batch_renorm(
        x, stats, scale, bias, None, train=train, r_max=r_max, d_max=d_max,
        feature_axis=feature_axis, momentum=momentum, epsilon=epsilon, ddof=ddof, debias=debias,
        mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype,
    )  # fmt: skip
    return y, stats


def keeping_batch_renorm(
    x: Any, stats: Any, scale: Any, bias: Any, kept: Moments | None, *, train: Any, r_max: Any,
    d_max: Any, feature_axis: Any, momentum: Any, epsilon: Any, ddof: Any, debias: Any, mask: Any,
    axis_name: Any, axis_index_groups: Any, dtype: Any,
) -> tuple[Array, BatchStats, Moments | None]:  # fmt: skip
    """`batch_renorm` in the same way."""
    called = "normjax.batch_renorm"
    # Bounds need an order, which complex numbers have not.
    x = _checks.inexact(called, "x", x, real=True)
    _checks.batch_stats(called, stats, BatchStats, "BatchStats")
    given = check(
        called, x, stats, scale, bias, train, feature_axis, momentum, epsilon, ddof, debias, mask,
        axis_name, axis_index_groups, dtype,
    )  # fmt: skip
    if not train:
        return evaluate(called, given, epsilon), stats, None
    _, var, count = given.stats
    # Schedules are functions of a number of the dtype of the variance.
    steps = None if count is None else count.astype(wide(var.dtype))
    counted = given.stats._replace(count=steps)
    r_max = _checks.bound(called, "r_max", r_max, 1, counted)
    d_max = _checks.bound(called, "d_max", d_max, 0, counted)
    with jax.named_scope(called):
        enough(called, given, axis_name, axis_index_groups)
        x = input_of_norm(x)
        wide_x = widened(x)
        moments = measured(x, wide_x, given.reduced, given.mask)
        if axis_name is not None:
            moments = synchronize(moments, axis_name, axis_index_groups)
        moments = moments_of_norm(moments)
        r, d = _correction(moments, given.stats, epsilon, r_max, d_max)
        # xhat r + d comes before scale and bias, in the widest dtype of the four.
        vectors = [v for v in (r, d, given.scale, given.bias) if v is not None]
        dtype = wide(*(v.dtype for v in vectors))
        r, d = (jnp.expand_dims(v, given.reduced).astype(dtype) for v in (r, d))
        gain = jnp.ones((), dtype) if given.scale is None else given.scale.astype(dtype)
        bias = jnp.zeros((), dtype) if given.bias is None else given.bias.astype(dtype)
        mean, var = moments.mean, moments.variance()
        y = normalize_batch(given, x, wide_x, mean, var, r * gain, d * gain + bias, epsilon)
        batch = with_kept(kept, moments)
        return y, move(given.stats, batch, momentum=momentum, debias=debias, ddof=ddof), batch


def _correction(moments: Moments, stats: BatchStats, epsilon: Any, r_max: Any, d_max: Any) -> Any:
    """r and d of Ioffe (2017), constants to every derivative."""
    dtype = wide(moments.mean.dtype, stats.mean.dtype)
    real = jnp.finfo(dtype).dtype
    batch, running = (
        jnp.sqrt(v.astype(real) + jnp.asarray(epsilon, real))
        for v in (moments.variance(), stats.var)
    )
    r_max, d_max = (jnp.asarray(v).astype(real) for v in (r_max, d_max))
    r = jnp.clip(batch / running, 1 / r_max, r_max)
    apart = moments.mean.astype(dtype) - stats.mean.astype(dtype)
    d = jnp.clip(apart / running.astype(dtype), -d_max, d_max)
    return lax.stop_gradient((r, d))
