"""Statistics shared between examples, hence state: batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks
from normjax._moments import measure, synchronize
from normjax._normalize import normalize
from normjax._stats import BatchStats, move


def batch_norm(
    x: ArrayLike,
    stats: BatchStats | None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    train: bool,
    feature_axis: int | Sequence[int] = -1,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    ddof: float = 0,
    debias: bool = False,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, BatchStats | None]:
    """Batch normalization, synchronized and masked; returns the output and the next statistics.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    With `train=True`, mean and var (biased) are those of the batch, over all axes but
    `feature_axis`, all devices along `axis_name` and all entries whose mask is True, and
    stats <- momentum stats + (1 - momentum) (mean, var with `ddof`). With `train=False` they are
    those of `stats`, which is returned as it is.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any rank of at least 2.
        stats: `BatchStats` of the shape of the feature axes. None keeps no running statistics:
            then `train=False` normalizes by the batch as well.
        scale, bias: of the shape of the feature axes; with a leading batch axis before it, one
            for each example (conditional batch norm, arXiv:1610.07629). Or None.
        train: a Python bool.
        feature_axis: the axis or axes that are kept; with several, in the order of x.
        momentum: weight of the OLD running value, from 0 to 1. None: the plain average over all
            batches; needs `stats.count`.
        epsilon: added to the variance, in the square of the units of x; 0 is allowed.
        ddof: correction of the running variance, 0 (Flax, the paper) or 1 (PyTorch).
        debias: correct the exponential average for its start; needs `stats.count`.
        mask: boolean, True = counts, broadcasts to `x` as in NumPy.
        axis_name: name or names of the mapped axes (pmap, shard_map, vmap) to share statistics
            over. Not needed under jit over sharded arrays.
        axis_index_groups: groups along `axis_name` that share among themselves only.
        dtype: of y, by default that of `x`.

    Returns:
        `(y, stats)`: y with the shape of `x`; stats in float32 or wider, complex mean for a
        complex `x`.

    Guarantees:
        stable: the error of y is a small multiple of eps (1 + |mean| / deviation).
        float32 inside: statistics of half precision input are computed and kept in float32.
        shared exactly: equal to one call on the concatenated batch, in value and gradient.
        masked out means out: a masked entry takes no part in the statistics, and no NaN or
            infinity at it reaches another entry, in value or derivative. Its own output depends
            on the statistics of the others, so a loss should leave it out.
        statistics stay finite: a non-finite step is not taken, for the feature concerned.
        no gradient: none flows through the running statistics.
        light backward: `x` in its own dtype and per-feature vectors are kept, nothing else.

    Edge cases:
        ===================================  ==================================================
        constant feature                     y = bias (epsilon > 0)
        feature with every entry masked      y = x * scale / sqrt(epsilon) + bias; its
                                             statistics stay as they are
        one valid entry                      y = bias there (epsilon > 0); with ddof=1 its
                                             statistics stay
        NaN or infinity that counts          y of its feature is NaN; its statistics stay
        NaN or infinity that is masked       taken as 0 in y, and has gradient 0
        deviations beyond 1e18 in float32    their squares overflow: y = bias, the
                                             statistics stay
        empty batch, train=False             y is empty
        momentum=1                           statistics never move
        momentum=0                           statistics of the last batch
        float32 stats, float64 x             statistics become float64
        ===================================  ==================================================

    Raises:
        TypeError: `x`, `scale`, `bias` or `stats` of integers, a complex one beside a real `x`,
            a mask that is not boolean, `stats` that are no `BatchStats`, a traced `train`, a
            real `dtype` for complex `x`.
        ValueError: wrong rank, axis, shape or range; a mask with two readings; with
            `train=True` fewer than two values for each feature.
        NameError: `axis_name` is not bound.
        NotImplementedError: `axis_index_groups` where JAX has none.

    References:
        Ioffe, Szegedy (2015), Batch Normalization, arXiv:1502.03167.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> x = jnp.array([[0.0, 10.0], [2.0, 30.0]])
        >>> stats = normjax.BatchStats.make(2)
        >>> y, stats = normjax.batch_norm(x, stats, train=True, momentum=0.9)
        >>> y.round(3)
        Array([[-1., -1.],
               [ 1.,  1.]], dtype=float32)
        >>> stats.mean
        Array([0.1, 2. ], dtype=float32)
    """
    called = "normjax.batch_norm"
    x = _checks.inexact(called, "x", x)
    reduced = _checks.reduced_axes(called, "feature_axis", feature_axis, x.shape)
    features = tuple(n for a, n in enumerate(x.shape) if a not in reduced)
    train = _checks.switch(called, "train", train)
    _checks.momentum(called, momentum, debias)
    _checks.ddof(called, ddof)

    _checks.groups(called, axis_name, axis_index_groups)
    is_real = not jnp.iscomplexobj(x)

    def vector(name: str, value: ArrayLike | None, real: bool = is_real) -> Any:
        if value is None:
            return None
        return _checks.feature_vector(
            called, name, value, features, feature_axis, x.shape, real=real
        )

    if stats is not None:
        _checks.batch_stats(called, stats, BatchStats)
        mean, var, count = stats
        stats = BatchStats(
            vector("stats.mean", mean),
            vector("stats.var", var, real=True),
            vector("stats.count", count, real=True),
        )
        if train:
            _checks.count(called, count, momentum, debias)
    kept = tuple(a for a in range(len(x.shape)) if a not in reduced)
    scale = _checks.affine(called, "scale", scale, kept, feature_axis, x.shape, real=is_real)
    bias = _checks.affine(called, "bias", bias, kept, feature_axis, x.shape, real=is_real)
    mask = _checks.mask(called, mask, x.shape)
    _checks.epsilon(called, epsilon)
    dtype = _checks.output_dtype(called, dtype, x.dtype)

    with jax.named_scope(called):
        if train or stats is None:
            shared = (
                1 if axis_name is None else _checks.axis_size(called, axis_name, axis_index_groups)
            )
            if train:
                _checks.entries(called, x.shape, reduced, shared)
            moments = measure(x, reduced, mask)
            if axis_name is not None:
                moments = synchronize(moments, axis_name, axis_index_groups)
            mean, var = moments.mean, moments.variance()
        else:
            mean, var = lax.stop_gradient((stats.mean, stats.var))
        if train and stats is not None:
            stats = move(stats, moments, momentum=momentum, debias=debias, ddof=ddof)

        mean, var = jnp.expand_dims(mean, reduced), jnp.expand_dims(var, reduced)
        y = normalize(x, mean, var, scale, bias, epsilon=epsilon, mask=mask, dtype=dtype)
    return y, stats
