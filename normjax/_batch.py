"""Statistics shared between examples, hence state: batch norm."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks
from normjax._moments import Moments, collapse, merge, synchronize, widened
from normjax._normalize import Activation, normalized, standardize
from normjax._stats import BatchStats, Stats, move
from normjax._walks import input_of_norm


@_checks.named("normjax.batch_norm")
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

    With `train=True`, mean and var (biased) are those of the batch, over all axes but
    `feature_axis`, all devices along `axis_name` and all entries whose mask is True, and
    stats <- momentum stats + (1 - momentum) (mean, var with `ddof`). With `train=False` they are
    those of `stats`, which is returned as it is.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any rank; of rank 1 it is one example.
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
        virtual_batch_size: normalize neighbors of this many examples along axis 0 by themselves
            ("ghost" batch norm, Hoffer et al. 2017, arXiv:1705.08741). The running statistics
            take in the moments of all, over `axis_name` too. Under jit over sharded arrays, the
            share of a device keeps statistics local to it.
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
        deviations beyond 1.8e19 / sqrt(n)   the sum of n squares overflows float32: y = bias,
                                             the statistics stay
        dy below 1e-38 var                   the part of dx that goes through the variance
                                             underflows in float32
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
    y, stats, _ = keeping_batch_norm(
        x, stats, scale, bias, None, train=train, feature_axis=feature_axis, momentum=momentum,
        epsilon=epsilon, ddof=ddof, debias=debias, mask=mask,
        virtual_batch_size=virtual_batch_size, axis_name=axis_name,
        axis_index_groups=axis_index_groups, dtype=dtype,
    )  # fmt: skip
    return y, stats


def keeping_batch_norm(
    x: Any, stats: Any, scale: Any, bias: Any, kept: Moments | None, *, train: Any,
    feature_axis: Any, momentum: Any, epsilon: Any, ddof: Any, debias: Any, mask: Any,
    virtual_batch_size: Any, axis_name: Any, axis_index_groups: Any, dtype: Any,
    activation: Activation | None = None,
) -> tuple[Array, Any, Moments | None]:  # fmt: skip
    """`batch_norm` whose statistics move by the moments of the batch and those kept before it.

    Returns `(y, stats, moments)`; the moments of both, or None where the batch was not measured.
    With an activation it is `batch_norm_act`.
    """
    called = "normjax.batch_norm"
    if activation is not None:
        called = "normjax.batch_norm_act"
        # An activation needs an order, which complex numbers have not.
        x = _checks.inexact(called, "x", x, real=True)
        _checks.activation(called, activation)
    given = check(
        called, x, stats, scale, bias, train, feature_axis, momentum, epsilon, ddof, debias, mask,
        axis_name, axis_index_groups, dtype,
    )  # fmt: skip
    if stats is not None and not train:
        return evaluate(called, given, epsilon, activation), stats, None
    ghosts = _checks.virtual_batches(called, virtual_batch_size, given.x.shape, given.reduced)
    with jax.named_scope(called):
        if ghosts is None:
            where = axis_name, axis_index_groups
            y, batch = _standardize(called, given, epsilon, *where, activation)
        else:
            given = _split(given, ghosts)
            y, moments = _standardize(called, given, epsilon, None, None, activation)
            batch = collapse(moments)
            if axis_name is not None:
                batch = synchronize(batch, axis_name, axis_index_groups)
        batch = with_kept(kept, batch)
        if train and given.stats is not None:
            stats = move(given.stats, batch, momentum=momentum, debias=debias, ddof=ddof)
    return y.reshape(jnp.shape(x)), stats, batch


class Given(NamedTuple):
    """Checked arguments; scale and bias in the rank of x."""

    x: Array
    stats: Any
    scale: Any
    bias: Any
    mask: Any
    train: bool
    reduced: tuple[int, ...]
    dtype: Any


def check(
    called: str, x: Any, stats: Any, scale: Any, bias: Any, train: Any, feature_axis: Any,
    momentum: Any, epsilon: Any, ddof: Any, debias: Any, mask: Any, axis_name: Any,
    axis_index_groups: Any, dtype: Any,
) -> Given:  # fmt: skip
    """Everything that can be wrong is found before anything is computed."""
    x = _checks.inexact(called, "x", x)
    reduced = _checks.reduced_axes(called, "feature_axis", feature_axis, x.shape)
    train = _checks.switch(called, "train", train)
    _checks.momentum(called, momentum, debias)
    _checks.epsilon(called, epsilon)
    _checks.ddof(called, ddof)
    _checks.groups(called, axis_name, axis_index_groups)
    kept = tuple(a for a in range(len(x.shape)) if a not in reduced)
    features = tuple(x.shape[a] for a in kept)
    real = not jnp.iscomplexobj(x)
    if stats is not None:
        _checks.batch_stats(called, stats, BatchStats, "BatchStats or None")
        mean, var = (
            _checks.feature_vector(
                called, f"stats.{name}", leaf, features, feature_axis, x.shape, real=is_real
            )
            for name, leaf, is_real in (("mean", stats.mean, real), ("var", stats.var, True))
        )
        stats = BatchStats(mean, var, stats.count)
        if train:
            _checks.count(called, stats.count, momentum, debias)
    scale = _checks.affine(called, "scale", scale, kept, feature_axis, x.shape, real=real)
    bias = _checks.affine(called, "bias", bias, kept, feature_axis, x.shape, real=real)
    mask = _checks.mask(called, mask, x.shape)
    dtype = _checks.output_dtype(called, dtype, x.dtype)
    return Given(x, stats, scale, bias, mask, train, reduced, dtype)


def _standardize(
    called: str, given: Given, epsilon: Any, axis_name: Any, axis_index_groups: Any,
    activation: Activation | None,
) -> tuple[Array, Moments]:  # fmt: skip
    enough(called, given, axis_name, axis_index_groups)
    return standardize(
        given.x, given.scale, given.bias, given.mask, epsilon=epsilon, axes=given.reduced,
        axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=given.dtype,
        activation=activation,
    )  # fmt: skip


def enough(called: str, given: Given, axis_name: Any, axis_index_groups: Any) -> None:
    """One value has no variance to train by."""
    shared = 1
    if axis_name is not None:
        shared = _checks.axis_size(called, axis_name, axis_index_groups)
    if given.train:
        _checks.entries(called, given.x.shape, given.reduced, shared)


def with_kept(kept: Moments | None, batch: Moments) -> Moments:
    """What the statistics take in: a state, which no gradient reaches."""
    return lax.stop_gradient(batch if kept is None else merge(kept, batch))


def evaluate(
    called: str, given: Given, epsilon: Any, activation: Activation | None = None
) -> Array:
    """By the running statistics, which no gradient reaches."""
    with jax.named_scope(called):
        x = input_of_norm(given.x)
        mean, var = lax.stop_gradient(given.stats[:2])
        affine = given.scale, given.bias
        return normalize_batch(given, x, widened(x), mean, var, *affine, epsilon, activation)


def normalize_batch(
    given: Given, x: Array, wide_x: Array, mean: Any, var: Any, scale: Any, bias: Any,
    epsilon: Any, activation: Activation | None = None,
) -> Array:  # fmt: skip
    """By vectors of the features; scale and bias are given in the rank of x."""
    mean, var = (jnp.expand_dims(v, given.reduced) for v in (mean, var))
    options: dict[str, Any] = dict(
        epsilon=epsilon, mask=given.mask, dtype=given.dtype, activation=activation
    )
    return normalized(x, wide_x, mean, var, scale, bias, **options)


def _split(given: Given, ghosts: int) -> Given:
    """Gives the virtual batches an axis of their own, before that of their examples."""

    def split(v: Any) -> Any:
        if v is None:
            return None
        return v.reshape(*((1, 1) if v.shape[0] == 1 else (ghosts, -1)), *v.shape[1:])

    parts = {name: split(getattr(given, name)) for name in ("x", "scale", "bias", "mask")}
    return given._replace(**parts, reduced=tuple(a + 1 for a in given.reduced))
