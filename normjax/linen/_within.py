"""Modules of norms within an example."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

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
class LayerNorm(nn.Module):
    """`normjax.layer_norm` as a module; a drop-in for `flax.linen.LayerNorm`.

    Attributes are those of Flax. `use_fast_variance` and `force_float32_reductions` have no effect:
    the exact variance, in float32 or wider, is always used. `init` needs no bound `axis_name`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer = normjax.linen.LayerNorm()
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 5, 4)))
        >>> layer.apply(variables, jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
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
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    @_errors.named("normjax.linen.LayerNorm", axis="reduction_axes", feature_axis="feature_axes")
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> Array:
        """Normalizes `x`.

        Args:
            x: floating or complex array.
            mask: True (nonzero, as in Flax) where an entry counts; broadcasts to `x`.
            scale, bias: used instead of the parameters, which are then not created.
        """
        return within.layer_norm(adapter(self), Call(x, mask, scale, bias))


@_errors.keywords
class RMSNorm(nn.Module):
    """`normjax.rms_norm` as a module; a drop-in for `flax.linen.RMSNorm`.

    Attributes are those of Flax. `use_fast_variance` and `force_float32_reductions` have no effect:
    the exact variance, in float32 or wider, is always used. `init` needs no bound `axis_name`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer = normjax.linen.RMSNorm()
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 5, 4)))
        >>> layer.apply(variables, jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    @_errors.named("normjax.linen.RMSNorm", axis="reduction_axes", feature_axis="feature_axes")
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
    ) -> Array:
        """Normalizes `x`.

        Args:
            x: floating or complex array.
            mask: True (nonzero, as in Flax) where an entry counts; broadcasts to `x`.
            scale: used instead of the parameter, which is then not created.
        """
        return within.rms_norm(adapter(self), Call(x, mask, scale))


@_errors.keywords
class GroupNorm(nn.Module):
    """`normjax.group_norm` as a module; a drop-in for `flax.linen.GroupNorm`.

    Attributes are those of Flax. `use_fast_variance` and `force_float32_reductions` have no effect:
    the exact variance, in float32 or wider, is always used. `init` needs no bound `axis_name`.
    `num_groups` is 32 unless `num_groups=None` leaves it to `group_size`. `feature_axis` is added.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer = normjax.linen.GroupNorm(num_groups=2)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 5, 4)))
        >>> layer.apply(variables, jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: int | Collection[int] | None = None
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    feature_axis: int = -1

    @nn.compact
    @_errors.named("normjax.linen.GroupNorm", axis="reduction_axes")
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> Array:
        """Normalizes `x`.

        Args:
            x: floating or complex array.
            mask: True (nonzero, as in Flax) where an entry counts; broadcasts to `x`.
            scale, bias: used instead of the parameters, which are then not created.
        """
        groups = dict(num_groups=self.num_groups, group_size=self.group_size)
        return within.group_norm(adapter(self), Call(x, mask, scale, bias), groups)


@_errors.keywords
class InstanceNorm(nn.Module):
    """`normjax.instance_norm` as a module; a drop-in for `flax.linen.InstanceNorm`.

    Attributes are those of Flax. `use_fast_variance` and `force_float32_reductions` have no effect:
    the exact variance, in float32 or wider, is always used. `init` needs no bound `axis_name`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> layer = normjax.linen.InstanceNorm()
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 5, 4)))
        >>> layer.apply(variables, jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    feature_axes: int | Collection[int] = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    @_errors.named("normjax.linen.InstanceNorm", feature_axis="feature_axes")
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> Array:
        """Normalizes `x`.

        Args:
            x: floating or complex array.
            mask: True (nonzero, as in Flax) where an entry counts; broadcasts to `x`.
            scale, bias: used instead of the parameters, which are then not created.
        """
        return within.instance_norm(adapter(self), Call(x, mask, scale, bias))
