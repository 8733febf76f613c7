"""Modules related to norms within an example: residual sums, filter response norm, dynamic tanh."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike

from normjax import _errors
from normjax._modules import within
from normjax._modules.adapter import Call
from normjax.nnx._adapter import adapter, make, make_affine
from normjax.nnx._fields import Affine, Scaled


@_errors.keywords
@dataclass(eq=False, repr=False, kw_only=True)
class AddLayerNorm(Affine):
    """`normjax.add_layer_norm` as a module: LayerNorm of a sum, which is also returned.

    Arguments and variables are those of `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer, x = normjax.nnx.AddLayerNorm(4, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
        >>> y, total = layer(x, x)
        >>> total[0, 0]
        Array(2., dtype=float32)
    """

    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1

    @_errors.named("normjax.nnx.AddLayerNorm", axis="reduction_axes", feature_axis="feature_axes")
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
@dataclass(eq=False, repr=False, kw_only=True)
class AddRMSNorm(Scaled):
    """`normjax.add_rms_norm` as a module: RMSNorm of a sum, which is also returned.

    Arguments and variables are those of `RMSNorm`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer, x = normjax.nnx.AddRMSNorm(4, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
        >>> y, total = layer(x, x)
        >>> total[0, 0]
        Array(2., dtype=float32)
    """

    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1

    @_errors.named("normjax.nnx.AddRMSNorm", axis="reduction_axes", feature_axis="feature_axes")
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
@dataclass(eq=False, repr=False)
class FilterResponseNorm(nnx.Module):
    """`normjax.filter_response_norm` as a module, with its learned threshold.

    Attributes:
        num_features: the size of the parameters.
        epsilon: added to the mean square.
        dtype: of the result; by default what the input and the parameters promote to.
        param_dtype: of the parameters.
        use_bias, use_scale, use_threshold: which parameters the module has.
        bias_init, scale_init, threshold_init: their initializers.
        feature_axes: the axes that are kept in addition to the first.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.FilterResponseNorm(4, rngs=nnx.Rngs(0))
        >>> sorted(nnx.state(layer))
        ['bias', 'scale', 'threshold']
    """

    num_features: int
    _: KW_ONLY
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    use_threshold: bool = True
    bias_init: InitVar[Initializer] = initializers.zeros
    scale_init: InitVar[Initializer] = initializers.ones
    threshold_init: InitVar[Initializer] = initializers.zeros
    feature_axes: int | Collection[int] = -1
    rngs: InitVar[nnx.Rngs]

    def __post_init__(
        self, bias_init: Any, scale_init: Any, threshold_init: Any, rngs: Any
    ) -> None:
        threshold = threshold_init, None
        make_affine(
            self, rngs, scale=(scale_init, None), bias=(bias_init, None), threshold=threshold
        )

    @_errors.named("normjax.nnx.FilterResponseNorm", feature_axis="feature_axes")
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
@dataclass(eq=False, repr=False)
class DynamicTanh(nnx.Module):
    """`normjax.dynamic_tanh` as a module, with its learned slope `alpha`.

    Attributes:
        num_features: the size of scale and bias.
        param_dtype: of the parameters.
        use_bias, use_scale: whether there is a bias, a scale.
        bias_init, scale_init, alpha_init: initializers.
        feature_axes: the axes of scale and bias.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> normjax.nnx.DynamicTanh(4, rngs=nnx.Rngs(0)).alpha[...]
        Array(0.5, dtype=float32)
    """

    num_features: int
    _: KW_ONLY
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: InitVar[Initializer] = initializers.zeros
    scale_init: InitVar[Initializer] = initializers.ones
    alpha_init: InitVar[Initializer] = initializers.constant(0.5)
    feature_axes: int | Collection[int] = -1
    rngs: InitVar[nnx.Rngs]

    def __post_init__(self, bias_init: Any, scale_init: Any, alpha_init: Any, rngs: Any) -> None:
        self.alpha = make(self, "alpha", alpha_init, (), rngs)
        make_affine(self, rngs, scale=(scale_init, None), bias=(bias_init, None))

    @_errors.named("normjax.nnx.DynamicTanh", feature_axis="feature_axes")
    def __call__(
        self, x: ArrayLike, *, scale: ArrayLike | None = None, bias: ArrayLike | None = None
    ) -> Array:
        """Squashes `x`, in its dtype; `scale` and `bias` replace the parameters."""
        return within.dynamic_tanh(adapter(self), Call(x, scale=scale, bias=bias))


@_errors.keywords
@dataclass(eq=False, repr=False)
class LocalResponseNorm(nnx.Module):
    """`normjax.local_response_norm` as a module; it has no variables.

    Attributes are the options of the function.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> normjax.nnx.LocalResponseNorm(size=3)(jnp.ones((2, 4))).shape
        (2, 4)
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    feature_axis: int = -1

    @_errors.named("normjax.nnx.LocalResponseNorm")
    def __call__(self, x: ArrayLike) -> Array:
        """Normalizes `x` by its neighbors along the features."""
        return within.local_response_norm(self, x)
