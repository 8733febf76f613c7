"""What every module does alike: parameters, masks and the dtype of the result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks


def affine(
    module: Any, features: tuple[int, ...], scale: ArrayLike | None, bias: ArrayLike | None
) -> tuple[ArrayLike | None, ArrayLike | None]:
    """The parameters that the module uses; what was given at the call stands in for them."""

    def vector(name: str, given: ArrayLike | None) -> ArrayLike | None:
        if given is not None or not getattr(module, f"use_{name}", False):
            return given
        return module.param(name, getattr(module, f"{name}_init"), features, module.param_dtype)

    # In the order of Flax, which decides what the initializers draw.
    return vector("scale", scale), vector("bias", bias)


def feature_shape(
    called: str, feature_axes: int | Iterable[int] | None, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a parameter over these axes; None names none."""
    if feature_axes is None:
        return ()
    return tuple(shape[a] for a in _checks.axes(called, "feature_axes", feature_axes, shape))


def as_mask(mask: ArrayLike | None) -> Array | None:
    """Any nonzero is True, as in Flax; the functions take booleans alone."""
    return None if mask is None else jnp.asarray(mask, bool)


def output_dtype(module: Any, *arrays: ArrayLike | None) -> DTypeLike:
    """The rule of Flax: what the input and the parameters promote to, unless one is asked for."""
    with jax.numpy_dtype_promotion("standard"):
        return canonicalize_dtype(*arrays, dtype=module.dtype)


def device_axis(module: nn.Module) -> dict[str, Any]:
    """Which devices share statistics; none in init, as in Flax."""
    if module.is_initializing():
        return {}
    return {"axis_name": module.axis_name, "axis_index_groups": module.axis_index_groups}
