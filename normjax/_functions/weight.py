"""Statistics of a weight: weight norm, spectral norm, standardized weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec, reshard
from jax.typing import ArrayLike

from normjax import _errors
from normjax._core.dtypes import accumulation_dtype
from normjax._core.measure import Reduction
from normjax._core.normalize import Output, normalize
from normjax._core.standardize import Inputs, Options, standardize


class SpectralStats(NamedTuple):
    """State of the power iteration.

    Attributes:
        u: the estimate of the right singular vector, shape (1, features).
        sigma: the last estimate of the largest singular value, shape ().
    """

    u: Array
    sigma: Array


@_errors.named("normjax.weight_norm", x="w")
def weight_norm(
    w: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    feature_axis: int | Collection[int] | None = -1,
    epsilon: ArrayLike = 1e-12,
) -> Array:
    """Weight normalization: the direction of a weight times a separate length.

        w / sqrt(sum(|w|^2) + epsilon) * scale

    Args:
        w: floating weight, for example the kernel of a Dense or Conv layer.
        scale: the length for each feature, of the shape of `feature_axis`, or None.
        feature_axis: the axes that are kept, by default the last; None keeps none.
        epsilon: added to the sum of squares.

    Returns:
        An array of the shape and dtype of `w`.

    Guarantees:
        float32 inside: the sum of squares of a half precision weight is computed in float32.

    Edge cases:
        ===================================  ==================================================
        zeros                                0 (epsilon > 0)
        ===================================  ==================================================

    Raises:
        TypeError: `w` or `scale` of integers.
        ValueError: a wrong axis or shape.

    References:
        Salimans, Kingma (2016), Weight Normalization, arXiv:1602.07868.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.weight_norm(jnp.array([[3.0], [4.0]]), jnp.array([10.0])).ravel()
        Array([6., 8.], dtype=float32)
    """
    inputs, axes = _inputs(w, "scale", scale, feature_axis, epsilon)
    options = Options(Reduction(axes, False), Output(inputs.x.dtype), summed=True)
    with jax.named_scope("normjax.weight_norm"):
        return standardize(inputs, options)[0][0]


@_errors.named("normjax.standardize_weight", x="w")
def standardize_weight(
    w: ArrayLike,
    gain: ArrayLike | None = None,
    *,
    feature_axis: int | Collection[int] = -1,
    epsilon: ArrayLike = 1e-5,
    scaled: bool = False,
) -> Array:
    """Weight standardization: normalizes each feature's weights by their mean and variance.

        (w - mean) / sqrt(var + epsilon) * gain
        scaled: (w - mean) / sqrt(n var + epsilon) * gain, n the number of weights of a feature

    Args:
        w: floating weight, for example the kernel of a Dense or Conv layer.
        gain: of the shape of `feature_axis`, or None.
        feature_axis: the axes that are kept, by default the last.
        epsilon: added to the variance, or to n times the variance.
        scaled: keep the variance of the layer's output instead (normalizer-free networks).

    Returns:
        An array of the shape and dtype of `w`.

    Guarantees:
        float32 inside: the statistics of a half precision weight are computed in float32.

    Edge cases:
        ===================================  ==================================================
        one weight for each feature          0
        ===================================  ==================================================

    Raises:
        TypeError: `w` or `gain` of integers.
        ValueError: a wrong axis or shape.

    References:
        Qiao et al. (2019), Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, arXiv:1903.10520; scaled: Brock et al. (2021), arXiv:2101.08692.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.standardize_weight(jnp.array([[1.0], [3.0]])).round(3).ravel()
        Array([-1.,  1.], dtype=float32)
    """
    inputs, axes = _inputs(w, "gain", gain, feature_axis, epsilon)
    scaled = _errors.switch("scaled", scaled)
    # n times the biased variance is m2 itself.
    options = Options(Reduction(axes), Output(inputs.x.dtype), summed=scaled)
    with jax.named_scope("normjax.standardize_weight"):
        return standardize(inputs, options)[0][0]


@_errors.named("normjax.spectral_norm", x="w")
def spectral_norm(
    w: ArrayLike,
    stats: SpectralStats,
    *,
    train: bool,
    n_steps: int = 1,
    epsilon: float = 1e-12,
) -> tuple[Array, SpectralStats]:
    """Spectral normalization: divides a weight by its largest singular value (power iteration).

        v = u W^T / |u W^T|,   u = v W / |v W|   (n_steps times),   sigma = v W u^T,   w / sigma

    with W the weight as a matrix of (all other axes, features).

    Args:
        w: floating weight of rank 2 or more, features along the last axis.
        stats: `SpectralStats`; start from a random u of shape (1, features).
        train: whether to update the state.
        n_steps: steps of the power iteration, at least 1.
        epsilon: added to the squared lengths of vectors, after scaling their largest entry to 1,
            so that small weights are normalized like others.

    Returns:
        `(w / sigma, stats)`, with the shape and dtypes of `w` and `stats`. With `train=False` the
        state is returned unchanged; sigma is still computed by `n_steps` steps, as in Flax.

    Guarantees:
        converges: sigma converges to the largest singular value over the steps, from any u but 0.
        no gradient: none flows through u and v; it flows through sigma.

    Edge cases:
        ===================================  ==================================================
        zeros                                w unchanged; u becomes 0 and stays 0, see below
        u = 0                                w unchanged, u and sigma are 0
        ===================================  ==================================================

    A weight that is initialized with zeros, such as a bias of attention, is therefore never
    normalized, as in Flax: dividing it by sigma would change its length from 0 to 1 in one training
    step. To normalize such a weight, draw a new u when it is no longer zero.

    Raises:
        TypeError: `w` of integers, a traced `train`.
        ValueError: rank below 2, u of a wrong shape, n_steps below 1.

    References:
        Miyato et al. (2018), Spectral Normalization for GANs, arXiv:1802.05957, Algorithm 1.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> w = jnp.diag(jnp.array([4.0, 1.0]))
        >>> stats = normjax.SpectralStats(jnp.array([[1.0, 0.1]]), jnp.ones(()))
        >>> w, stats = normjax.spectral_norm(w, stats, train=True, n_steps=5)
        >>> stats.sigma.round(3)
        Array(4., dtype=float32)
    """
    w = _errors.inexact("w", w, real=True)
    train = _errors.switch("train", train)
    _errors.matrix(w.shape, stats, SpectralStats, n_steps)
    _errors.epsilon(epsilon)
    with jax.named_scope("normjax.spectral_norm"):
        kernel = w.astype(accumulation_dtype(w.dtype))
        *rows, features = range(w.ndim)
        fixed = lax.stop_gradient(kernel)
        u = stats.u[0].astype(kernel.dtype)
        for _ in range(n_steps):
            along = _contracted(fixed, u, [features])
            v = _unit(along, along, epsilon)
            u = _unit(_contracted(fixed, v, rows), u, epsilon)
        u, v = lax.stop_gradient((u, v))
        sigma = jnp.sum(_contracted(kernel, v, rows) * u)
        divisor = jnp.where(sigma != 0, sigma, jnp.ones((), sigma.dtype))
        normed = normalize(w, None, 1.0, 1 / divisor, epsilon=0.0)
        if not train:
            return normed, stats
        sigma = lax.stop_gradient(sigma).astype(stats.sigma.dtype)
        return normed, SpectralStats(u[None].astype(stats.u.dtype), sigma)


def _contracted(kernel: Array, vector: Array, axes: list[int]) -> Array:
    """The sum of kernel times vector over `axes`, the first ones or the last.

    In full precision, for any sharding. The kernel is not reshaped to a matrix: that would gather
    a kernel that is sharded along several axes.
    """
    place, out = jax.typeof(kernel).sharding, None
    if any(place.spec):
        # Explicit axes: with a vector of another sharding the whole kernel would be gathered.
        spec = PartitionSpec(*(place.spec[a] for a in axes))
        vector = reshard(vector, place.update(spec=spec))
        kept = (s for a, s in enumerate(place.spec) if a not in axes)
        out = place.update(spec=PartitionSpec(*kept))
    # XLA transposes a kernel on the right whose last axes are contracted, and one on the left whose
    # first axes are.
    operands = [(vector, range(vector.ndim)), (kernel, axes)]
    (left, left_axes), (right, right_axes) = operands if 0 in axes else reversed(operands)
    return lax.dot_general(
        left,
        right,
        ((left_axes, right_axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        out_sharding=out,
    )


def _unit(vector: Array, otherwise: Array, epsilon: float) -> Array:
    """A vector divided by its length; zeros stay zeros, and `otherwise` replaces NaN."""
    largest = jnp.max(jnp.abs(vector))
    found = largest > 0
    scaled = vector / jnp.where(found, largest, jnp.ones((), vector.dtype))
    unit = weight_norm(scaled, feature_axis=None, epsilon=epsilon)
    # jnp.where needs equal shardings, which adding zeros gives.
    otherwise = otherwise + jnp.zeros_like(unit)
    return jnp.where(jnp.isnan(largest), otherwise, jnp.where(found, unit, vector))


def _inputs(
    w: ArrayLike, name: str, scale: ArrayLike | None,
    feature_axis: int | Collection[int] | None, epsilon: ArrayLike,
) -> tuple[Inputs, tuple[int, ...]]:  # fmt: skip
    """Checked inputs and reduced axes.

    A first axis of size 1 is added, so that a weight with feature axes only has an axis to reduce.
    """
    w = _errors.inexact("w", w)
    features = _errors.features(w.shape, () if feature_axis is None else feature_axis)
    _errors.nonempty(w.shape, features.reduced)
    w, axes = w[None], (0, *(a + 1 for a in features.reduced))
    if scale is not None:
        scale = _errors.feature_vector(name, scale, features, real=not jnp.iscomplexobj(w))
        scale = jnp.expand_dims(scale, axes)
    _errors.epsilon(epsilon)
    return Inputs(w, scale=scale, epsilon=epsilon), axes
