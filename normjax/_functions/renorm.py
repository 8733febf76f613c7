"""Batch renormalization: batch norm in training, corrected towards the running statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._core.dtypes import accumulation_dtype, real_dtype
from normjax._core.moments import Moments
from normjax._core.standardize import Inputs, standardize
from normjax._functions.batch import Arguments, check, enough, evaluate
from normjax._stats import BatchStats


@_errors.named("normjax.batch_renorm")
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
    """Batch renormalization: batch norm corrected towards its output in evaluation.

        y = ((x - mean) / s * r + d) * scale + bias,   s = sqrt(var + epsilon)
        r = clip(s / running s, 1/r_max, r_max),   d = clip((mean - running mean) / running s,
        -d_max, d_max)

    With `train=True`, mean and var are those of the batch. If r and d are within their bounds, y
    equals the output by the running statistics; with r_max = 1, d_max = 0 it is that of batch norm.
    With `train=False`, it is batch norm by the running statistics.

    Args:
        x, scale, bias, train, feature_axis, momentum, epsilon: as in `batch_norm`.
        ddof, debias, mask, axis_name, axis_index_groups, dtype: as in `batch_norm`.
        stats: `BatchStats` of the shape of the feature axes; r and d need them.
        r_max: at least 1; a number, or a schedule: a function from `stats.count` (the number of
            updates of each feature, in the dtype of the variance) to a number.
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
        traced bound below its least         not checked: r = r_max, d = d_max
        ===================================  ==================================================

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as in `batch_norm`.
        ValueError: r_max below 1, d_max below 0; a schedule without `stats.count`.

    References:
        Ioffe (2017), Batch Renormalization, arXiv:1702.03275.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> x = jnp.array([[0.0], [4.0]])
        >>> y, stats = normjax.batch_renorm(x, normjax.BatchStats.make(1), train=True)
        >>> y.round(2).ravel()
        Array([0., 4.], dtype=float32)
    """
    arguments = Arguments(
        x, stats, scale, bias, train, feature_axis, momentum, epsilon, ddof, debias, mask,
        axis_name, axis_index_groups, dtype, r_max=r_max, d_max=d_max,
    )  # fmt: skip
    y, moments = run(arguments)
    return y, arguments.moved(moments)


def run(arguments: Arguments) -> tuple[Array, Moments | None]:
    """y and the moments of the batch, or None if it was not measured."""
    # Complex numbers have no order, which bounds need.
    x = _errors.inexact("x", arguments.x, real=True)
    _errors.batch_stats(arguments.stats, BatchStats, "BatchStats")
    inputs, options, stats, train = check(arguments._replace(x=x))
    assert stats is not None
    with jax.named_scope("normjax.batch_renorm"):
        if not train:
            return evaluate(inputs, stats.mean, stats.var, options), None
        axes = options.reduction.axes
        # A schedule gets the count in the dtype of the variance.
        dtype = accumulation_dtype(stats.var.dtype)
        counted = stats._replace(count=None if stats.count is None else stats.count.astype(dtype))
        r_max = _errors.bound("r_max", arguments.r_max, 1, counted)
        d_max = _errors.bound("d_max", arguments.d_max, 0, counted)
        # A schedule may give a number for each feature.
        bounds = (v if jnp.ndim(v) == 0 else jnp.expand_dims(v, axes) for v in (r_max, d_max))
        inputs = inputs._replace(other=(jnp.expand_dims(stats.var, axes), *bounds))
        enough(inputs, options, train)
        y, moments = standardize(inputs, options._replace(correction=_correction))
        return y, lax.stop_gradient(moments)


def _correction(moments: Moments, inputs: Inputs) -> tuple[Array, Array]:
    """r and d of Ioffe (2017)."""
    running_mean, (running_var, r_max, d_max) = inputs.pivot, inputs.other
    assert running_mean is not None
    dtype = accumulation_dtype(moments.mean.dtype, running_mean.dtype)
    real = real_dtype(dtype)
    batch, running = (
        jnp.sqrt(v.astype(real) + jnp.asarray(inputs.epsilon, real))
        for v in (moments.variance(), running_var)
    )
    r_max, d_max = (jnp.asarray(v).astype(real) for v in (r_max, d_max))
    r = jnp.clip(batch / running, 1 / r_max, r_max)
    difference = moments.mean.astype(dtype) - running_mean.astype(dtype)
    return r, jnp.clip(difference / running.astype(dtype), -d_max, d_max)
