"""Modules of norms within an example."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from typing import Any

from jax import Array
from jax.typing import ArrayLike

from normjax import _errors
from normjax._modules import within
from normjax._modules.adapter import Call
from normjax.nnx._adapter import adapter
from normjax.nnx._fields import Affine, Scaled


@_errors.keywords
@dataclass(eq=False, repr=False, kw_only=True)
class LayerNorm(Affine):
    """`normjax.layer_norm` as a module; a drop-in for `flax.nnx.LayerNorm`.

    Arguments and variables are those of Flax. `use_fast_variance` has no effect: the exact
    variance, in float32 or wider, is always used. With the default `promote_dtype`, only the result
    is rounded, once, to `dtype`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.LayerNorm(4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1

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
            scale, bias: used instead of the parameters.
        """
        return within.layer_norm(adapter(self), Call(x, mask, scale, bias))


@_errors.keywords
@dataclass(eq=False, repr=False, kw_only=True)
class RMSNorm(Scaled):
    """`normjax.rms_norm` as a module; a drop-in for `flax.nnx.RMSNorm`.

    Arguments and variables are those of Flax. `use_fast_variance` has no effect; see `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.RMSNorm(4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    reduction_axes: int | Collection[int] = -1
    feature_axes: int | Collection[int] = -1

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
            scale: used instead of the parameter.
        """
        return within.rms_norm(adapter(self), Call(x, mask, scale))


@_errors.keywords
@dataclass(eq=False, repr=False)
class GroupNorm(Affine):
    """`normjax.group_norm` as a module; a drop-in for `flax.nnx.GroupNorm`.

    Arguments and variables are those of Flax. `use_fast_variance` has no effect; see `LayerNorm`.
    `num_groups` is 32 unless `num_groups=None` leaves it to `group_size`. `feature_axis` is added.
    Any number of leading axes is allowed, and a mask need not have the size of the features.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    num_groups: int | None = 32
    group_size: int | None = None
    _: KW_ONLY
    reduction_axes: int | Collection[int] | None = None
    feature_axis: int = -1

    def __post_init__(self, *made_from: Any) -> None:
        # As in Flax, the constructor checks divisibility and sets both numbers.
        sizes = self.num_groups, self.group_size, self.num_features
        self.num_groups, self.group_size = _errors.groups_of_features(*sizes)
        super().__post_init__(*made_from)

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
            scale, bias: used instead of the parameters.
        """
        groups = dict(num_groups=self.num_groups)
        return within.group_norm(adapter(self), Call(x, mask, scale, bias), groups)


@_errors.keywords
@dataclass(eq=False, repr=False, kw_only=True)
class InstanceNorm(Affine):
    """`normjax.instance_norm` as a module; a drop-in for `flax.nnx.InstanceNorm`.

    Arguments and variables are those of Flax. `use_fast_variance` has no effect; see `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.InstanceNorm(4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 4))).shape
        (2, 5, 4)
    """

    feature_axes: int | Collection[int] = -1

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
            scale, bias: used instead of the parameters.
        """
        return within.instance_norm(adapter(self), Call(x, mask, scale, bias))
