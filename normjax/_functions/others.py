"""Other norms, each a few lines over the same core."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._core.dtypes import accumulation_dtype
from normjax._core.measure import Reduction
from normjax._core.normalize import Output
from normjax._core.remat import input_of_norm
from normjax._core.standardize import Inputs, Options, standardize, standardized
from normjax._functions.layer import affine, checked, within
from normjax._functions.maps import Window, damped, squashed, thresholded


@_errors.named("normjax.filter_response_norm")
def filter_response_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    *,
    feature_axis: int | Collection[int] = -1,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Filter response normalization with its thresholded linear unit.

        y = max(x / sqrt(mean(x^2) + epsilon) * scale + bias, threshold)

    with the mean over the positions of each feature of each example.

    Args:
        x: floating array, examples along axis 0.
        scale, bias: of the shape of `feature_axis`, or with a leading batch axis, or None.
        threshold: likewise; None omits the linear unit.
        feature_axis: the axis or axes that are kept in addition to the first.
        epsilon: added to the mean square.
        mask: boolean, True where an entry counts, broadcasts to `x` as in NumPy.
        dtype: of y, by default that of `x`.

    Returns:
        An array of the shape of `x`.

    Guarantees:
        masked out means out: a masked entry does not affect the mean square, and a NaN or
            infinity there reaches no other entry, in value or derivative.
        light backward: only `x` in its own dtype and vectors are kept.

    Edge cases:
        ===================================  ==================================================
        one position                         y = max(sign(x) * scale + bias, threshold)
        y at the threshold                   half of the gradient goes to each, as in PyTorch
        ===================================  ==================================================

    Raises:
        TypeError, ValueError: as in `instance_norm`.

    References:
        Singh, Krishnan (2020), Filter Response Normalization Layer, arXiv:1911.09737.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> x = jnp.array([[[3.0], [-3.0]]])
        >>> normjax.filter_response_norm(x, threshold=jnp.zeros(1)).round(3).ravel()
        Array([1., 0.], dtype=float32)
    """
    x = _errors.inexact("x", x, real=True)
    features = _errors.features(x.shape, feature_axis, batch=True)
    scale, bias = affine(x, scale, bias, features)
    floor = _errors.affine("threshold", threshold, features, real=True)
    inputs, reduction = Inputs(x, mask, scale, bias, epsilon), Reduction(features.reduced, False)
    with jax.named_scope("normjax.filter_response_norm"):
        if floor is None:
            return within(inputs, reduction, dtype)
        inputs, options = checked(inputs, reduction, dtype)
        inputs = inputs._replace(x=input_of_norm(x))
        y, moments = standardized(inputs, options)
        floor = floor.astype(accumulation_dtype(floor.dtype, y.dtype))
        return thresholded(y, floor, inputs, moments.variance())


@_errors.named("normjax.dynamic_tanh")
def dynamic_tanh(
    x: ArrayLike,
    alpha: ArrayLike = 0.5,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: int | Collection[int] = -1,
) -> Array:
    """Dynamic tanh: an elementwise replacement of a norm, without statistics.

        y = tanh(alpha x) * scale + bias

    Args:
        x: floating array.
        alpha: a scalar, learned in practice, 0.5 at the start.
        scale, bias: of the shape of `feature_axis`, or with a leading batch axis, or None.
        feature_axis: the axis or axes of scale and bias.

    Returns:
        An array of the shape and dtype of `x`.

    Guarantees:
        no statistics: each entry of the result depends on one entry of `x`.
        light backward: only `x` in its own dtype and vectors are kept.

    Raises:
        TypeError, ValueError: as in `layer_norm`; an alpha that is not a scalar.

    References:
        Zhu et al. (2025), Transformers without Normalization, arXiv:2503.10622.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.dynamic_tanh(jnp.array([0.0, 100.0]))
        Array([0., 1.], dtype=float32)
    """
    x = _errors.inexact("x", x, real=True)
    dtype = accumulation_dtype(x.dtype)
    slope = _errors.scalar("alpha", alpha, dtype)
    scale, bias = affine(x, scale, bias, _errors.features(x.shape, feature_axis))
    vectors = (v if v is None else v.astype(dtype) for v in (scale, bias))
    with jax.named_scope("normjax.dynamic_tanh"):
        return squashed(x, slope.reshape((1,) * x.ndim), *vectors)


@_errors.named("normjax.local_response_norm")
def local_response_norm(
    x: ArrayLike,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    feature_axis: int = -1,
) -> Array:
    """Local response normalization: scales each feature by its neighbors at the same position.

        y = x / (k + alpha mean(x^2 over `size` neighboring features))^beta

    The window contains size // 2 features before and (size - 1) // 2 after. Features beyond the
    ends are zero, as in PyTorch.

    Args:
        x: floating array.
        size: features in the window, at least 1.
        alpha, beta, k: as in the formula.
        feature_axis: the axis of the features.

    Returns:
        An array of the shape and dtype of `x`.

    Guarantees:
        float32 inside: half precision input is squared and summed in float32.
        light backward: only `x` in its own dtype is kept.

    Raises:
        TypeError: `x` of integers or complex.
        ValueError: a wrong axis, size below 1, k not above 0.

    References:
        Krizhevsky, Sutskever, Hinton (2012), ImageNet Classification with Deep Convolutional
        Neural Networks, section 3.3, with the mean in place of the sum.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.local_response_norm(jnp.array([2.0, 0.0]), size=2, alpha=0.5, beta=1.0)
        Array([1., 0.], dtype=float32)
    """
    x = _errors.inexact("x", x, real=True)
    axis = _errors.axis("feature_axis", feature_axis, x.shape)
    _errors.window(size)
    alpha, beta = _errors.finite("alpha", alpha), _errors.finite("beta", beta)
    k = _errors.positive("k", k)
    with jax.named_scope("normjax.local_response_norm"):
        numbers = (
            jnp.asarray(v, accumulation_dtype(x.dtype)).reshape((1,) * x.ndim)
            for v in (alpha, beta, k)
        )
        return damped(Window(int(size), axis - x.ndim), x, *numbers)


@_errors.named("normjax.l2_normalize")
def l2_normalize(
    x: ArrayLike, *, axis: int | Collection[int] = -1, epsilon: ArrayLike = 1e-12
) -> Array:
    """Unit norm: divides a vector by its Euclidean length.

        y = x / sqrt(sum(|x|^2) + epsilon)

    Args:
        x: floating or complex array.
        axis: the axis or axes of a vector.
        epsilon: added to the sum of squares.

    Returns:
        An array of the shape and dtype of `x`.

    Guarantees:
        float32 inside: the sum of squares of half precision input is computed in float32.

    Edge cases:
        ===================================  ==================================================
        zeros                                0, with a finite gradient (epsilon > 0)
        ===================================  ==================================================

    Raises:
        TypeError: `x` of integers.
        ValueError: a wrong axis, negative epsilon.

    References:
        The unit vector of linear algebra; as a layer, Wang et al. (2017), NormFace,
        arXiv:1704.06369.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.l2_normalize(jnp.array([3.0, 4.0]))
        Array([0.6, 0.8], dtype=float32)
    """
    x = _errors.inexact("x", x)
    axes = _errors.axes("axis", axis, x.shape)
    _errors.epsilon(epsilon)
    options = Options(Reduction(axes, False), Output(x.dtype), summed=True)
    with jax.named_scope("normjax.l2_normalize"):
        return standardize(Inputs(x, epsilon=epsilon), options)[0]
