"""Batch norm: examples share statistics, so there is state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._core.measure import Reduction
from normjax._core.moments import Moments, collapse, synchronized
from normjax._core.normalize import Activation, Output, Vectors, normalized
from normjax._core.remat import input_of_norm
from normjax._core.standardize import Inputs, Options, standardize
from normjax._stats import BatchStats, Stats, next_stats


@_errors.named("normjax.batch_norm")
def batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    train: bool,
    feature_axis: int | Collection[int] = -1,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    ddof: float = 0,
    debias: bool = False,
    mask: ArrayLike | None = None,
    virtual_batch_size: int | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Stats]:
    """Batch normalization, synchronized and masked; returns the output and the next statistics.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    With `train=True`, mean and var (biased) are those of the batch: over all axes but
    `feature_axis`, all devices along `axis_name` and all entries whose mask is True. The
    statistics are updated: stats <- momentum stats + (1 - momentum) (mean, var with `ddof`). With
    `train=False`, mean and var are those of `stats`, which is returned unchanged.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any rank; an x of rank 1 is one example.
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
        debias: correct the exponential average for its initial value; needs `stats.count`.
        mask: boolean, True where an entry counts, broadcasts to `x` as in NumPy.
        virtual_batch_size: normalize each block of this many examples along axis 0 separately
            ("ghost" batch norm, Hoffer et al. 2017, arXiv:1705.08741). The running statistics
            use the moments of all blocks, over `axis_name` too. Under jit over sharded arrays, a
            block of the size of a device's share has statistics local to the device.
        axis_name: name or names of the mapped axes (pmap, shard_map, vmap) to share statistics
            over. Not needed under jit over sharded arrays.
        axis_index_groups: groups along `axis_name`; statistics are shared within each group.
        dtype: of y, by default that of `x`.

    Returns:
        `(y, stats)`: y with the shape of `x`; stats in float32 or wider, complex mean for a
        complex `x`.

    Guarantees:
        stable: the error of y is a small multiple of eps (1 + |mean| / deviation).
        float32 inside: statistics of half precision input are computed and kept in float32.
        shared exactly: equal to one call on the concatenated batch, in value and gradient.
        masked out means out: a masked entry does not affect the statistics, and a NaN or
            infinity there reaches no other entry, in value or derivative. Its own output depends
            on the statistics of the others, so exclude it from the loss.
        statistics stay finite: a feature whose update is not finite keeps its statistics.
        no gradient: none flows through the running statistics.
        light backward: only `x` in its own dtype and per-feature vectors are kept.

    Edge cases:
        ===================================  ==================================================
        constant feature                     y = bias (epsilon > 0)
        feature with every entry masked      y = x * scale / sqrt(epsilon) + bias; its
                                             statistics stay unchanged
        one valid entry                      y = bias there (epsilon > 0); with ddof=1 its
                                             statistics stay
        NaN or infinity that counts          y of its feature is NaN; its statistics stay
        NaN or infinity that is masked       replaced by 0 in y, with gradient 0
        deviations beyond 1.8e19 / sqrt(n)   the sum of n squares overflows float32: y = bias,
                                             the statistics stay
        dy below 1e-38 var                   the part of dx that goes through the variance
                                             underflows in float32
        empty batch, train=False             y is empty
        momentum=1                           statistics never change
        momentum=0                           statistics of the last batch
        float32 stats, float64 x             statistics become float64
        ===================================  ==================================================

    Raises:
        TypeError: `x`, `scale`, `bias` or `stats` of integers, a complex one with a real `x`,
            a mask that is not boolean, `stats` that is not `BatchStats`, a traced `train`, a
            real `dtype` for complex `x`.
        ValueError: wrong rank, axis, shape or range; an ambiguous mask; with `train=True` fewer
            than two values for each feature.
        NameError: `axis_name` is not bound.
        NotImplementedError: `axis_index_groups` where JAX does not implement it.

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
    arguments = Arguments(
        x, stats, scale, bias, train, feature_axis, momentum, epsilon, ddof, debias, mask,
        axis_name, axis_index_groups, dtype, virtual_batch_size,
    )  # fmt: skip
    y, moments = run(arguments)
    return y, arguments.moved(moments)


class Arguments(NamedTuple):
    """The arguments of the batch norm functions, as given."""

    x: Any
    stats: Any
    scale: Any
    bias: Any
    train: Any
    feature_axis: Any
    momentum: Any
    epsilon: Any
    ddof: Any
    debias: Any
    mask: Any
    axis_name: Any
    axis_index_groups: Any
    dtype: Any
    virtual_batch_size: Any = None
    activation: Activation | None = None
    r_max: Any = None
    d_max: Any = None

    def moved(self, moments: Moments | None) -> Any:
        """The updated statistics; unchanged if no batch was measured."""
        if moments is None or self.stats is None:
            return self.stats
        return next_stats(self.stats, moments, self.momentum, self.debias, self.ddof)


def run(arguments: Arguments) -> tuple[Array, Moments | None]:
    """y and the moments of the batch, or None if it was not measured."""
    inputs, options, stats, train = check(arguments)
    x, where = inputs.x, options.reduction
    activated = options.output.activation is not None
    with jax.named_scope("normjax.batch_norm_act" if activated else "normjax.batch_norm"):
        if stats is not None and not train:
            return evaluate(inputs, stats.mean, stats.var, options), None
        ghosts = _errors.virtual_batches(arguments.virtual_batch_size, x.shape, where.axes)
        if ghosts is not None:
            inputs = inputs.split(0, ghosts)
            within = Reduction(tuple(a + 1 for a in where.axes))
            options = options._replace(reduction=within)
        enough(inputs, options, train)
        y, moments = standardize(inputs, options)
        moments = lax.stop_gradient(moments)
        if ghosts is None:
            return y, moments
        moments = collapse(moments)
        if where.axis_name is not None:
            with _errors.grouped(where.axis_name, where.axis_index_groups):
                moments = synchronized(moments, where.axis_name, where.axis_index_groups)
        return y.reshape(x.shape), moments


def check(arguments: Arguments) -> tuple[Inputs, Options, BatchStats | None, bool]:
    """Checks all arguments; returns inputs, options, statistics and whether to train."""
    a = arguments
    # Complex numbers have no order, which an activation needs.
    x = _errors.inexact("x", a.x, real=a.activation is not None)
    if a.activation is not None:
        _errors.activation(a.activation)
    features = _errors.features(x.shape, a.feature_axis)
    train = _errors.switch("train", a.train)
    _errors.momentum(a.momentum, a.debias)
    _errors.epsilon(a.epsilon)
    _errors.ddof(a.ddof)
    _errors.groups(a.axis_name, a.axis_index_groups)
    real = x.dtype.kind != "c"
    stats, pivot = a.stats, None
    if stats is not None:
        _errors.batch_stats(stats, BatchStats, "BatchStats or None")
        mean = _errors.feature_vector("stats.mean", stats.mean, features, real=real)
        var = _errors.feature_vector("stats.var", stats.var, features, real=True)
        stats = BatchStats(mean, var, stats.count)
        if train:
            _errors.count(stats.count, a.momentum, a.debias)
            pivot = jnp.expand_dims(mean, features.reduced)
    scale = _errors.affine("scale", a.scale, features, real=real)
    bias = _errors.affine("bias", a.bias, features, real=real)
    mask = _errors.mask(a.mask, x.shape)
    dtype = _errors.output_dtype(a.dtype, x.dtype)
    reduction = Reduction(features.reduced, True, a.axis_name, a.axis_index_groups)
    options = Options(reduction.hashable(), Output(dtype, a.activation))
    return Inputs(x, mask, scale, bias, a.epsilon, pivot), options, stats, train


def enough(inputs: Inputs, options: Options, train: bool) -> None:
    """Training needs at least two values for each feature."""
    shared, where = 1, options.reduction
    if where.axis_name is not None:
        shared = _errors.axis_size(where.axis_name, where.axis_index_groups)
    if train:
        _errors.entries(inputs.x.shape, where.axes, shared)


# Compiled, since Python takes longer to make the vectors than the device.
@partial(jax.jit, static_argnums=3, inline=True)
def evaluate(inputs: Inputs, mean: Array, var: Array, options: Options) -> Array:
    """Normalizes by the running statistics, which get no gradient."""
    x = input_of_norm(inputs.x)
    axes = options.reduction.axes
    mean, var = (jnp.expand_dims(v, axes) for v in lax.stop_gradient((mean, var)))
    vectors = Vectors.make(x.dtype, mean, var, inputs.scale, inputs.bias, inputs.epsilon)
    return normalized(x, inputs.mask, vectors, options.output)
