"""Layer norm and RMS norm: each example has its own statistics."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._core.measure import Reduction
from normjax._core.normalize import Output
from normjax._core.standardize import Inputs, Options, standardize


@_errors.named("normjax.layer_norm")
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
    """Layer normalization: normalizes each example by its mean and variance over `axis`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: floating or complex array.
        scale, bias: of the shape of `feature_axis`; with a leading batch axis before it, one for
            each example (conditional normalization). Or None.
        axis: the axis or axes to reduce.
        feature_axis: the axes of scale and bias, by default `axis`.
        epsilon: added to the variance, in the square of the units of x.
        mask: boolean, True where an entry counts, broadcasts to `x` as in NumPy.
        axis_name, axis_index_groups: mapped axes over which the reduced axes are split.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        stable: the error of y is a small multiple of eps (1 + |mean| / deviation).
        float32 inside: statistics of half precision input are computed in float32.
        masked out means out: a masked entry does not affect the statistics, and a NaN or
            infinity there reaches no other entry, in value or derivative.
        light backward: only `x` in its own dtype and one vector for each axis are kept.

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
        ValueError: a wrong axis or shape, an ambiguous mask, nothing to reduce.
        NameError: `axis_name` is not bound.

    References:
        Ba, Kiros, Hinton (2016), Layer Normalization, arXiv:1607.06450.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3)
        Array([[-1.,  1.],
               [-1.,  1.]], dtype=float32)
    """
    x = _errors.inexact("x", x)
    axes = _errors.axes("axis", axis, x.shape)
    features = _errors.features(x.shape, axes if feature_axis is None else feature_axis)
    inputs = Inputs(x, mask, *affine(x, scale, bias, features), epsilon)
    with jax.named_scope("normjax.layer_norm"):
        return within(inputs, Reduction(axes, True, axis_name, axis_index_groups), dtype)


@_errors.named("normjax.rms_norm")
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
    """RMS normalization: divides each example by the root of its mean square over `axis`.

        y = x / sqrt(mean(|x|^2) + epsilon) * scale

    Args:
        x: floating or complex array.
        scale: of the shape of `feature_axis`; with a leading batch axis before it, one for each
            example. Or None. For a stored gamma with scale = 1 + gamma, pass 1 + gamma.
        axis: the axis or axes to reduce.
        feature_axis: the axes of scale, by default `axis`.
        epsilon: added to the mean square, in the square of the units of x.
        mask: boolean, True where an entry counts, broadcasts to `x` as in NumPy.
        axis_name, axis_index_groups: mapped axes over which the reduced axes are split.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        float32 inside: the mean square of half precision input is computed in float32.
        masked out means out: a masked entry does not affect the mean square, and a NaN or
            infinity there reaches no other entry, in value or derivative.
        light backward: only `x` in its own dtype and one vector for each axis are kept.

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
        ValueError: a wrong axis or shape, an ambiguous mask, nothing to reduce.
        NameError: `axis_name` is not bound.

    References:
        Zhang, Sennrich (2019), Root Mean Square Layer Normalization, arXiv:1910.07467.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.rms_norm(jnp.array([3.0, 4.0, 0.0, 0.0])).round(3)
        Array([1.2, 1.6, 0. , 0. ], dtype=float32)
    """
    x = _errors.inexact("x", x)
    axes = _errors.axes("axis", axis, x.shape)
    features = _errors.features(x.shape, axes if feature_axis is None else feature_axis)
    inputs = Inputs(x, mask, *affine(x, scale, None, features), epsilon)
    with jax.named_scope("normjax.rms_norm"):
        return within(inputs, Reduction(axes, False, axis_name, axis_index_groups), dtype)


def affine(
    x: Array, scale: ArrayLike | None, bias: ArrayLike | None, features: _errors.Features
) -> tuple[Array | None, Array | None]:
    """scale and bias in the rank of x, for each feature, or for each feature of each example."""
    real = not jnp.iscomplexobj(x)
    return (
        _errors.affine("scale", scale, features, real=real),
        _errors.affine("bias", bias, features, real=real),
    )


def within(inputs: Inputs, reduction: Reduction, dtype: DTypeLike | None) -> Array:
    """Checks the arguments that all norms have; measures, shares and normalizes."""
    return standardize(*checked(inputs, reduction, dtype))[0]


def checked(
    inputs: Inputs, reduction: Reduction, dtype: DTypeLike | None
) -> tuple[Inputs, Options]:
    """Checks the arguments that all norms have; the mask gets the rank of x."""
    x, name, groups = inputs.x, reduction.axis_name, reduction.axis_index_groups
    _errors.epsilon(inputs.epsilon)
    _errors.groups(name, groups)
    _errors.nonempty(x.shape, reduction.axes)
    inputs = inputs._replace(mask=_errors.mask(inputs.mask, x.shape))
    output = Output(_errors.output_dtype(dtype, x.dtype))
    if name is not None:
        _errors.axis_size(name, groups)
    return inputs, Options(reduction.hashable(), output)
