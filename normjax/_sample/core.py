"""Layer, RMS, group and instance norm: measure and normalize over other axes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks
from normjax._moments import Moments, collapse
from normjax._normalize import standardize
from normjax._walks import written


@_checks.named("normjax.layer_norm")
def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Collection[int] = -1,
    feature_axis: int | Collection[int] | None = None,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Layer normalization: each example by its own mean and variance over `axis`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: floating or complex array.
        scale, bias: of the shape of `feature_axis`; with a leading batch axis before it, one for
            each example (conditional normalization). Or None.
        axis: the axis or axes to reduce.
        feature_axis: the axes of scale and bias, by default `axis`.
        epsilon: added to the variance, in the square of the units of x.
        mask: boolean, True = counts, broadcasts to `x` as in NumPy.
        axis_name, axis_index_groups: mapped axes over which the reduced axes are split.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        stable: the error of y is a small multiple of eps (1 + |mean| / deviation).
        float32 inside: statistics of half precision input are computed in float32.
        masked out means out: a masked entry takes no part in the statistics, and no NaN or
            infinity at it reaches another entry, in value or derivative.
        light backward: `x` in its own dtype and one vector for each axis are kept, nothing else.

    Edge cases:
        ===================================  ==================================================
        one element                          y = bias (epsilon > 0)
        constant example                     y = bias (epsilon > 0)
        example with every entry masked      y = x * scale / sqrt(epsilon) + bias
        deviations beyond 1.8e19 / sqrt(n)   the sum of n squares overflows float32: y = bias
        dy below 1e-38 var                   the part of dx that goes through the variance
                                             underflows in float32
        ===================================  ==================================================

    Raises:
        TypeError: `x`, `scale` or `bias` of integers, or a mask that is not boolean.
        ValueError: a wrong axis or shape, a mask with two readings, nothing to reduce.
        NameError: `axis_name` is not bound.

    References:
        Ba, Kiros, Hinton (2016), Layer Normalization, arXiv:1607.06450.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3)
        Array([[-1.,  1.],
               [-1.,  1.]], dtype=float32)
    """
    called = "normjax.layer_norm"
    x = _checks.inexact(called, "x", x)
    axes = _checks.axes(called, "axis", axis, x.shape)
    feature_axis = axes if feature_axis is None else feature_axis
    scale, bias = affine(called, x, scale, bias, feature_axis)
    options: dict[str, Any] = dict(
        epsilon=epsilon, axis_name=axis_name, axis_index_groups=axis_index_groups
    )
    return within(called, x, scale, bias, axes, mask=mask, dtype=dtype, **options)


@_checks.named("normjax.rms_norm")
def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int | Collection[int] = -1,
    feature_axis: int | Collection[int] | None = None,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """RMS normalization: each example by the root of its mean square over `axis`.

        y = x / sqrt(mean(|x|^2) + epsilon) * scale

    Args:
        x: floating or complex array.
        scale: of the shape of `feature_axis`; with a leading batch axis before it, one for each
            example. Or None. For a stored gamma with scale = 1 + gamma, pass 1 + gamma.
        axis: the axis or axes to reduce.
        feature_axis: the axes of scale, by default `axis`.
        epsilon: added to the mean square, in the square of the units of x.
        mask: boolean, True = counts, broadcasts to `x` as in NumPy.
        axis_name, axis_index_groups: mapped axes over which the reduced axes are split.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        float32 inside: the mean square of half precision input is computed in float32.
        masked out means out: a masked entry takes no part in the mean square, and no NaN or
            infinity at it reaches another entry, in value or derivative.
        light backward: `x` in its own dtype and one vector for each axis are kept, nothing else.

    Edge cases:
        ===================================  ==================================================
        one element                          y = sign(x) * scale (|x| >> sqrt(epsilon))
        zeros                                y = 0 (epsilon > 0)
        x beyond 1.8e19 / sqrt(n)            the sum of n squares overflows float32: y = 0
        dy below 1e-38 mean(x^2)             the part of dx that goes through the mean square
                                             underflows in float32
        ===================================  ==================================================

    Raises:
        TypeError: `x` or `scale` of integers, or a mask that is not boolean.
        ValueError: a wrong axis or shape, a mask with two readings, nothing to reduce.
        NameError: `axis_name` is not bound.

    References:
        Zhang, Sennrich (2019), Root Mean Square Layer Normalization, arXiv:1910.07467.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.rms_norm(jnp.array([3.0, 4.0, 0.0, 0.0])).round(3)
        Array([1.2, 1.6, 0. , 0. ], dtype=float32)
    """
    called = "normjax.rms_norm"
    x = _checks.inexact(called, "x", x)
    axes = _checks.axes(called, "axis", axis, x.shape)
    feature_axis = axes if feature_axis is None else feature_axis
    scale, _ = affine(called, x, scale, None, feature_axis)
    options: dict[str, Any] = dict(
        epsilon=epsilon, axis_name=axis_name, axis_index_groups=axis_index_groups
    )
    return within(called, x, scale, None, axes, centered=False, mask=mask, dtype=dtype, **options)


@_checks.named("normjax.group_norm")
def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    feature_axis: int = -1,
    axis: int | Collection[int] | None = None,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Group normalization: each example by the mean and variance of groups of its features.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: floating or complex array, examples along axis 0.
        scale, bias: of shape (C,), or (N, C) with one for each example, or None.
        num_groups: into how many groups of neighbors the features are divided.
        group_size: or how many features a group has. Exactly one of both is given.
        feature_axis: the axis of the features.
        axis: the axes to reduce beside the features of a group, by default all but the first.
            Give it where x has more than one leading batch axis.
        epsilon: added to the variance, in the square of the units of x.
        mask: boolean, True = counts, broadcasts to `x` as in NumPy.
        axis_name, axis_index_groups: mapped axes over which the reduced axes are split.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        stable: the error of y is a small multiple of eps (1 + |mean| / deviation).
        masked out means out: a masked entry takes no part in the statistics, and no NaN or
            infinity at it reaches another entry, in value or derivative.
        light backward: `x` in its own dtype and one vector for each axis are kept, nothing else.

    Edge cases:
        ===================================  ==================================================
        one group                            layer norm over all axes but the first
        groups of one feature                instance norm
        ===================================  ==================================================

    Raises:
        TypeError: `x`, `scale` or `bias` of integers, or a mask that is not boolean.
        ValueError: both or neither of `num_groups` and `group_size`, or one that does not divide
            the features; a wrong axis or shape, a mask with two readings, nothing to reduce.
        NameError: `axis_name` is not bound.

    References:
        Wu, He (2018), Group Normalization, arXiv:1803.08494.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), num_groups=2).round(3)
        Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    called = "normjax.group_norm"
    x = _checks.inexact(called, "x", x)
    feature = _checks.axis(called, "feature_axis", feature_axis, x.shape)
    reduced = tuple(a for a in range(1, len(x.shape)) if a != feature)
    if axis is not None:
        reduced = _checks.axes(called, "axis", axis, x.shape)
    groups = _checks.number_of_groups(called, num_groups, group_size, x.shape[feature])
    scale, bias = affine(called, x, scale, bias, feature)
    mask = _checks.mask(called, mask, x.shape)
    options: dict[str, Any] = dict(
        epsilon=epsilon, axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype
    )
    spatial = tuple(a for a in reduced if a != feature)
    if not spatial:
        split = partial(_split, axis=feature, groups=groups)
        vectors = split(scale), split(bias), (feature + 1,)
        return within(called, split(x), *vectors, mask=split(mask), **options).reshape(x.shape)
    # Merging what was measured for each feature is faster than measuring groups: x need not be
    # seen in another shape, and sums over a few neighbors at a time are slow.
    pooled = _OfGroups(feature - sum(a < feature for a in spatial), groups)
    return within(called, x, scale, bias, spatial, mask=mask, pooled=pooled, **options)


def _split(v: Any, axis: int, groups: int) -> Any:
    """Gives the groups an axis of their own, before that of the features of a group."""
    if v is None:
        return None
    two = (1, 1) if v.shape[axis] == 1 else (groups, v.shape[axis] // groups)
    return v.reshape((*v.shape[:axis], *two, *v.shape[axis + 1 :]))


class _OfGroups(NamedTuple):
    """For each feature the moments of its group."""

    axis: int
    groups: int

    def __call__(self, moments: Moments) -> Moments:
        count, mean, m2 = moments
        single = np.ndim(count) == 0
        count = count if single else self._stacked(count)
        merged = collapse(Moments(count, self._stacked(mean), self._stacked(m2)))
        count = merged.count if single else self._spread(merged.count, mean.shape)
        return Moments(count, *(self._spread(v, mean.shape) for v in merged[1:]))

    def _stacked(self, v: Any) -> Any:
        return jnp.moveaxis(_split(written(v), self.axis, self.groups), self.axis + 1, 0)

    def _spread(self, v: Any, shape: tuple[int, ...]) -> Any:
        # By hand, since jnp.repeat asks where explicitly sharded features shall lie.
        size = shape[self.axis] // self.groups
        apart = (*v.shape[: self.axis + 1], size, *v.shape[self.axis + 1 :])
        whole = jnp.broadcast_to(jnp.expand_dims(v, self.axis + 1), apart)
        return written(whole.reshape(shape))


@_checks.named("normjax.instance_norm")
def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: int | Collection[int] = -1,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Instance normalization: each feature of each example by its own mean and variance.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: floating or complex array, examples along axis 0.
        scale, bias: of the shape of `feature_axis`; with a leading batch axis before it, one for
            each example, which is adaptive instance norm (arXiv:1703.06868). Or None.
        feature_axis: the axis or axes that are kept beside the first.
        epsilon: added to the variance, in the square of the units of x.
        mask: boolean, True = counts, broadcasts to `x` as in NumPy.
        axis_name, axis_index_groups: mapped axes over which the reduced axes are split.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        stable: the error of y is a small multiple of eps (1 + |mean| / deviation).
        masked out means out: a masked entry takes no part in the statistics, and no NaN or
            infinity at it reaches another entry, in value or derivative.
        light backward: `x` in its own dtype and one vector for each axis are kept, nothing else.

    Edge cases:
        ===================================  ==================================================
        one element                          y = bias (epsilon > 0)
        ===================================  ==================================================

    Raises:
        TypeError: `x`, `scale` or `bias` of integers, or a mask that is not boolean.
        ValueError: a wrong axis or shape, a mask with two readings, nothing to reduce.
        NameError: `axis_name` is not bound.

    References:
        Ulyanov, Vedaldi, Lempitsky (2016), Instance Normalization, arXiv:1607.08022.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.instance_norm(jnp.array([[[1.0, 10.0], [3.0, 30.0]]])).round(3)
        Array([[[-1., -1.],
                [ 1.,  1.]]], dtype=float32)
    """
    called = "normjax.instance_norm"
    x = _checks.inexact(called, "x", x)
    reduced = _checks.reduced_axes(called, "feature_axis", feature_axis, x.shape, batch=True)
    scale, bias = affine(called, x, scale, bias, feature_axis)
    options: dict[str, Any] = dict(
        epsilon=epsilon, axis_name=axis_name, axis_index_groups=axis_index_groups
    )
    return within(called, x, scale, bias, reduced, mask=mask, dtype=dtype, **options)


def affine(
    called: str,
    x: Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    feature_axis: int | Collection[int],
) -> tuple[Array | None, Array | None]:
    """scale and bias in the rank of x, for each feature or for each feature of each example."""
    kept = _checks.axes(called, "feature_axis", feature_axis, x.shape)
    real = not jnp.iscomplexobj(x)
    return (
        _checks.affine(called, "scale", scale, kept, feature_axis, x.shape, real=real),
        _checks.affine(called, "bias", bias, kept, feature_axis, x.shape, real=real),
    )


def within(
    called: str,
    x: Array,
    scale: Any,
    bias: Any,
    axes: tuple[int, ...],
    *,
    centered: bool = True,
    epsilon: ArrayLike,
    mask: ArrayLike | None,
    axis_name: Any,
    axis_index_groups: Any,
    dtype: DTypeLike | None,
    pooled: Any = None,
) -> Array:
    """Measure, share where the reduced axes are split over devices, normalize."""
    _checks.epsilon(called, epsilon)
    _checks.groups(called, axis_name, axis_index_groups)
    _checks.something(called, x.shape, axes)
    mask = _checks.mask(called, mask, x.shape)
    dtype = _checks.output_dtype(called, dtype, x.dtype)
    if axis_name is not None:
        _checks.axis_size(called, axis_name, axis_index_groups)
    options: dict[str, Any] = dict(epsilon=epsilon, dtype=dtype, centered=centered, pooled=pooled)
    where: dict[str, Any] = dict(axis_name=axis_name, axis_index_groups=axis_index_groups)
    with jax.named_scope(called):
        return standardize(x, scale, bias, mask, axes=axes, **options, **where)[0]
