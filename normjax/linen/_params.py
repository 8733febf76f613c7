"""What every module does alike: parameters, masks and the dtype of the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.errors import ScopeCollectionNotFound, ScopeVariableNotFoundError
from flax.linen.dtypes import canonicalize_dtype
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors


class MissingStatsError(ScopeCollectionNotFound, ScopeVariableNotFoundError):
    """There are no statistics to start from or to normalize by; the classes that Flax raises."""

    def __init__(self, path: Sequence[str], reader: str, missing: str):
        # Flax would append a link to its own documentation of the class.
        collection = missing.split("/")[0]
        Exception.__init__(
            self,
            f"normjax at '/{'/'.join(path)}': {reader} needs {missing!r}, which the variables do "
            f"not have. model.init makes the collection {collection!r} and training moves it. "
            f"Pass it beside the parameters: model.apply({{'params': ..., {collection!r}: ...}}).",
        )


def affine(
    module: Any, features: tuple[int, ...], scale: ArrayLike | None, bias: ArrayLike | None
) -> tuple[ArrayLike | None, ArrayLike | None]:
    """The parameters that the module uses; what was given at the call stands in for them."""

    def vector(name: str, given: ArrayLike | None) -> ArrayLike | None:
        if given is not None:
            return _errors.inexact(name, given)
        return param(module, name, features) if getattr(module, f"use_{name}", False) else None

    # In the order of Flax, which decides what the initializers draw.
    return vector("scale", scale), vector("bias", bias)


def param(module: Any, name: str, shape: tuple[int, ...], path: str | None = None) -> Array:
    """The parameter `name`, which the module's `<name>_init` makes in its `param_dtype`."""
    init, dtype = getattr(module, f"{name}_init"), module.param_dtype
    _errors.initializer(f"{name}_init", init)
    _errors.floating_dtype("param_dtype", dtype)
    return module.param(path or name, init, shape, dtype)


def feature_shape(
    feature_axes: int | Iterable[int] | None, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a parameter over these axes; None names none."""
    if feature_axes is None:
        return ()
    return _errors.features(shape, feature_axes).shape


def as_mask(mask: ArrayLike | None) -> Array | None:
    """Any nonzero is True, as in Flax; the functions take booleans alone."""
    return _errors.nonzero(mask)


def output_dtype(module: Any, *arrays: ArrayLike | None) -> DTypeLike:
    """The rule of Flax: what the input and the parameters promote to, unless one is asked for."""
    if module.dtype is not None:
        _errors.floating_dtype("dtype", module.dtype)
    with jax.numpy_dtype_promotion("standard"):
        return canonicalize_dtype(*arrays, dtype=module.dtype)


def device_axis(module: nn.Module) -> dict[str, Any]:
    """Which devices share statistics; none in init, as in Flax."""
    if module.is_initializing():
        return {}
    return {"axis_name": module.axis_name, "axis_index_groups": module.axis_index_groups}
