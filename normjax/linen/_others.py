"""Modules related to norms within an example: residual sums, filter response norm, dynamic tanh."""

from __future__ import annotations

from collections.abc import Collection

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike

from normjax import _errors
from normjax._modules import within
from normjax._modules.adapter import Call
from normjax.linen._adapter import adapter


@_errors.keywords
class AddLayerNorm(nn.Module):
    """`normjax.add_layer_norm` as a module: LayerNorm of a sum, which is also returned.

    Attributes and variables are those of `LayerNorm`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer, x = normjax.linen.AddLayerNorm(), jnp.ones((2, 4))
        >>> (y, total), variables = layer.init_with_output(jax.random.key(0), x, x)
        >>> total[0, 0]
        Array(2., dtype=float32)
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1

    @nn.compact
    @_errors.named("normjax.linen.AddLayerNorm", axis="reduction_axes", feature_axis="feature_axes")
    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> tuple[Array, Array]:
        """Returns `(y, x + residual)`; vectors that are passed replace the parameters."""
        return within.add_layer_norm(adapter(self), Call(x, mask, scale, bias), residual)


@_errors.keywords
class AddRMSNorm(nn.Module):
    """`normjax.add_rms_norm` as a module: RMSNorm of a sum, which is also returned.

    Attributes and variables are those of `RMSNorm`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer, x = normjax.linen.AddRMSNorm(), jnp.ones((2, 4))
        >>> (y, total), variables = layer.init_with_output(jax.random.key(0), x, x)
        >>> total[0, 0]
        Array(2., dtype=float32)
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1

    @nn.compact
    @_errors.named("normjax.linen.AddRMSNorm", axis="reduction_axes", feature_axis="feature_axes")
    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
    ) -> tuple[Array, Array]:
        """Returns `(y, x + residual)`; vectors that are passed replace the parameters."""
        return within.add_rms_norm(adapter(self), Call(x, mask, scale), residual)


@_errors.keywords
class FilterResponseNorm(nn.Module):
    """`normjax.filter_response_norm` as a module, with its learned threshold.

    Attributes:
        epsilon: added to the mean square.
        dtype: of the result; by default what the input and the parameters promote to.
        param_dtype: of the parameters.
        use_bias, use_scale, use_threshold: which parameters the module has.
        bias_init, scale_init, threshold_init: their initializers.
        feature_axes: the axes that are kept in addition to the first.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer, x = normjax.linen.FilterResponseNorm(), jnp.ones((2, 5, 4))
        >>> sorted(layer.init(jax.random.key(0), x)["params"])
        ['bias', 'scale', 'threshold']
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    use_threshold: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    threshold_init: Initializer = initializers.zeros
    feature_axes: int | Collection[int] = -1

    @nn.compact
    @_errors.named("normjax.linen.FilterResponseNorm", feature_axis="feature_axes")
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> Array:
        """Normalizes and thresholds `x`; `scale` and `bias` replace the parameters."""
        return within.filter_response_norm(adapter(self), Call(x, mask, scale, bias))


@_errors.keywords
class DynamicTanh(nn.Module):
    """`normjax.dynamic_tanh` as a module, with its learned slope `alpha`.

    Attributes:
        param_dtype: of the parameters.
        use_bias, use_scale: whether there is a bias, a scale.
        bias_init, scale_init, alpha_init: initializers.
        feature_axes: the axes of scale and bias.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer, x = normjax.linen.DynamicTanh(), jnp.ones((2, 4))
        >>> layer.init(jax.random.key(0), x)["params"]["alpha"]
        Array(0.5, dtype=float32)
    """

    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    alpha_init: Initializer = initializers.constant(0.5)
    feature_axes: int | Collection[int] = -1

    @nn.compact
    @_errors.named("normjax.linen.DynamicTanh", feature_axis="feature_axes")
    def __call__(
        self, x: ArrayLike, *, scale: ArrayLike | None = None, bias: ArrayLike | None = None
    ) -> Array:
        """Squashes `x`, in its dtype; `scale` and `bias` replace the parameters."""
        return within.dynamic_tanh(adapter(self), Call(x, scale=scale, bias=bias))


@_errors.keywords
class LocalResponseNorm(nn.Module):
    """`normjax.local_response_norm` as a module; it has no variables.

    Attributes are the options of the function.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer = normjax.linen.LocalResponseNorm(size=3)
        >>> layer.apply({}, jnp.ones((2, 4))).shape
        (2, 4)
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    feature_axis: int = -1

    @nn.compact
    @_errors.named("normjax.linen.LocalResponseNorm")
    def __call__(self, x: ArrayLike) -> Array:
        """Normalizes `x` by its neighbors along the features."""
        return within.local_response_norm(self, x)
