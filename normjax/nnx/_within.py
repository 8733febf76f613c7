"""Norms within an example: `Param` in and out of the functions of `normjax`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax import Array
from jax.typing import ArrayLike

from normjax import _errors
from normjax._modules import within
from normjax._modules.shell import Call
from normjax.nnx._shell import Metadata, make_affine, shell


@_errors.keywords
@dataclass(eq=False, repr=False)
class LayerNorm(nnx.Module):
    """`normjax.layer_norm` as a module; a drop-in for `flax.nnx.LayerNorm`.

    Arguments and variables are those of Flax. `use_fast_variance` has no effect: the exact
    variance, in float32 or wider, is always used. The result is rounded once, to `dtype`; the
    default `promote_dtype` rounds nothing before.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.LayerNorm(4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    num_features: int
    _: KW_ONLY
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: InitVar[Initializer] = initializers.zeros
    scale_init: InitVar[Initializer] = initializers.ones
    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    promote_dtype: PromoteDtypeFn = promote_dtype
    rngs: InitVar[nnx.Rngs]
    bias_metadata: InitVar[Metadata] = None
    scale_metadata: InitVar[Metadata] = None

    def __post_init__(
        self, bias_init: Any, scale_init: Any, rngs: Any, bias_metadata: Any, scale_metadata: Any
    ) -> None:
        scale, bias = (scale_init, scale_metadata), (bias_init, bias_metadata)
        make_affine(self, rngs, scale=scale, bias=bias)

    @_errors.named("normjax.nnx.LayerNorm", axis="reduction_axes", feature_axis="feature_axes")
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
            scale, bias: in place of the parameters.
        """
        return within.layer_norm(shell(self), Call(x, mask, scale, bias))


@_errors.keywords
@dataclass(eq=False, repr=False)
class RMSNorm(nnx.Module):
    """`normjax.rms_norm` as a module; a drop-in for `flax.nnx.RMSNorm`.

    Arguments and variables are those of Flax. `use_fast_variance` has no effect; see `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.RMSNorm(4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    num_features: int
    _: KW_ONLY
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: InitVar[Initializer] = initializers.ones
    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    promote_dtype: PromoteDtypeFn = promote_dtype
    rngs: InitVar[nnx.Rngs]
    scale_metadata: InitVar[Metadata] = None

    def __post_init__(self, scale_init: Any, rngs: Any, scale_metadata: Any) -> None:
        make_affine(self, rngs, scale=(scale_init, scale_metadata))

    @_errors.named("normjax.nnx.RMSNorm", axis="reduction_axes", feature_axis="feature_axes")
    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        scale: ArrayLike | None = None,
    ) -> Array:
        """Normalizes `x`.

        Args:
            x: floating or complex array.
            mask: True (nonzero, as in Flax) where an entry counts; broadcasts to `x`.
            scale: in place of the parameter.
        """
        return within.rms_norm(shell(self), Call(x, mask, scale))


@_errors.keywords
@dataclass(eq=False, repr=False)
class GroupNorm(nnx.Module):
    """`normjax.group_norm` as a module; a drop-in for `flax.nnx.GroupNorm`.

    Arguments and variables are those of Flax. `use_fast_variance` has no effect; see `LayerNorm`.
    `num_groups` is 32 unless `num_groups=None` leaves it to `group_size`. `feature_axis` is added.
    Any number of leading axes is right, and a mask need not have the size of the features.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    num_features: int
    num_groups: int | None = 32
    group_size: int | None = None
    _: KW_ONLY
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: InitVar[Initializer] = initializers.zeros
    scale_init: InitVar[Initializer] = initializers.ones
    reduction_axes: int | Collection[int] | None = None
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    promote_dtype: PromoteDtypeFn = promote_dtype
    rngs: InitVar[nnx.Rngs]
    bias_metadata: InitVar[Metadata] = None
    scale_metadata: InitVar[Metadata] = None
    feature_axis: int = -1

    def __post_init__(
        self, bias_init: Any, scale_init: Any, rngs: Any, bias_metadata: Any, scale_metadata: Any
    ) -> None:
        # As in Flax the constructor says what does not divide, and both numbers are known then.
        sizes = self.num_groups, self.group_size, self.num_features
        self.num_groups, self.group_size = _errors.groups_of_features(*sizes)
        scale, bias = (scale_init, scale_metadata), (bias_init, bias_metadata)
        make_affine(self, rngs, scale=scale, bias=bias)

    @_errors.named("normjax.nnx.GroupNorm", axis="reduction_axes")
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
            scale, bias: in place of the parameters.
        """
        groups = dict(num_groups=self.num_groups)
        return within.group_norm(shell(self), Call(x, mask, scale, bias), groups)


@_errors.keywords
@dataclass(eq=False, repr=False)
class InstanceNorm(nnx.Module):
    """`normjax.instance_norm` as a module; a drop-in for `flax.nnx.InstanceNorm`.

    Arguments and variables are those of Flax. `use_fast_variance` has no effect; see `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.InstanceNorm(4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    num_features: int
    _: KW_ONLY
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: InitVar[Initializer] = initializers.zeros
    scale_init: InitVar[Initializer] = initializers.ones
    feature_axes: int | Collection[int] = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    promote_dtype: PromoteDtypeFn = promote_dtype
    rngs: InitVar[nnx.Rngs]
    bias_metadata: InitVar[Metadata] = None
    scale_metadata: InitVar[Metadata] = None

    def __post_init__(
        self, bias_init: Any, scale_init: Any, rngs: Any, bias_metadata: Any, scale_metadata: Any
    ) -> None:
        scale, bias = (scale_init, scale_metadata), (bias_init, bias_metadata)
        make_affine(self, rngs, scale=scale, bias=bias)

    @_errors.named("normjax.nnx.InstanceNorm", feature_axis="feature_axes")
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
            scale, bias: in place of the parameters.
        """
        return within.instance_norm(shell(self), Call(x, mask, scale, bias))
