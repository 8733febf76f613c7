"""Group norm and instance norm: parts of each example have their own statistics."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._core.measure import FeatureGroups, Reduction
from normjax._core.standardize import Inputs
from normjax._functions.layer import affine, within


@_errors.named("normjax.group_norm")
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
    """Group normalization: normalizes groups of features of each example by mean and variance.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: floating or complex array, examples along axis 0.
        scale, bias: of shape (C,), or (N, C) with one for each example, or None.
        num_groups: number of groups of neighboring features.
        group_size: number of features in a group. Pass either `num_groups` or `group_size`.
        feature_axis: the axis of the features.
        axis: the axes to reduce in addition to the features of a group, by default all but the
            first. Pass it if x has several leading batch axes.
        epsilon: added to the variance, in the square of the units of x.
        mask: boolean, True where an entry counts, broadcasts to `x` as in NumPy.
        axis_name, axis_index_groups: mapped axes over which the reduced axes are split.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        stable: the error of y is a small multiple of eps (1 + |mean| / deviation).
        masked out means out: a masked entry does not affect the statistics, and a NaN or
            infinity there reaches no other entry, in value or derivative.
        light backward: only `x` in its own dtype and one vector for each axis are kept.

    Edge cases:
        ===================================  ==================================================
        one group                            layer norm over all axes but the first
        groups of one feature                instance norm
        ===================================  ==================================================

    Raises:
        TypeError: `x`, `scale` or `bias` of integers, or a mask that is not boolean.
        ValueError: both or neither of `num_groups` and `group_size`, or one that does not divide
            the features; a wrong axis or shape, an ambiguous mask, nothing to reduce.
        NameError: `axis_name` is not bound.

    References:
        Wu, He (2018), Group Normalization, arXiv:1803.08494.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), num_groups=2).round(3)
        Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    x = _errors.inexact("x", x)
    feature = _errors.axis("feature_axis", feature_axis, x.shape)
    reduced = tuple(a for a in range(1, len(x.shape)) if a != feature)
    if axis is not None:
        reduced = _errors.axes("axis", axis, x.shape)
    groups = _errors.number_of_groups(num_groups, group_size, x.shape[feature])
    scale, bias = affine(x, scale, bias, _errors.features(x.shape, feature))
    inputs = Inputs(x, _errors.mask(mask, x.shape), scale, bias, epsilon)
    where = axis_name, axis_index_groups
    spatial = tuple(a for a in reduced if a != feature)
    with jax.named_scope("normjax.group_norm"):
        if not spatial:
            reduction = Reduction((feature + 1,), True, *where)
            return within(inputs.split(feature, groups), reduction, dtype).reshape(x.shape)
        # Measuring each feature and merging over the group is faster than measuring the group: x
        # is not reshaped, and sums over a few neighboring features are slow.
        reduction = Reduction(spatial, True, *where, FeatureGroups(feature, groups))
        return within(inputs, reduction, dtype)


@_errors.named("normjax.instance_norm")
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
    """Instance normalization: normalizes each feature of each example by its mean and variance.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: floating or complex array, examples along axis 0.
        scale, bias: of the shape of `feature_axis`; with a leading batch axis before it, one for
            each example, which is adaptive instance norm (arXiv:1703.06868). Or None.
        feature_axis: the axis or axes that are kept in addition to the first.
        epsilon: added to the variance, in the square of the units of x.
        mask: boolean, True where an entry counts, broadcasts to `x` as in NumPy.
        axis_name, axis_index_groups: mapped axes over which the reduced axes are split.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        stable: the error of y is a small multiple of eps (1 + |mean| / deviation).
        masked out means out: a masked entry does not affect the statistics, and a NaN or
            infinity there reaches no other entry, in value or derivative.
        light backward: only `x` in its own dtype and one vector for each axis are kept.

    Edge cases:
        ===================================  ==================================================
        one element                          y = bias (epsilon > 0)
        ===================================  ==================================================

    Raises:
        TypeError: `x`, `scale` or `bias` of integers, or a mask that is not boolean.
        ValueError: a wrong axis or shape, an ambiguous mask, nothing to reduce.
        NameError: `axis_name` is not bound.

    References:
        Ulyanov, Vedaldi, Lempitsky (2016), Instance Normalization, arXiv:1607.08022.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.instance_norm(jnp.array([[[1.0, 10.0], [3.0, 30.0]]])).round(3)
        Array([[[-1., -1.],
                [ 1.,  1.]]], dtype=float32)
    """
    x = _errors.inexact("x", x)
    features = _errors.features(x.shape, feature_axis, batch=True)
    inputs = Inputs(x, mask, *affine(x, scale, bias, features), epsilon)
    reduction = Reduction(features.reduced, True, axis_name, axis_index_groups)
    with jax.named_scope("normjax.instance_norm"):
        return within(inputs, reduction, dtype)
