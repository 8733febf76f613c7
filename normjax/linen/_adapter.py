"""Code that all linen modules share: their parameters, and the error of missing statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax.errors import ScopeCollectionNotFound, ScopeVariableNotFoundError
from jax import Array

from normjax import _errors
from normjax._modules.adapter import Adapter, expect_initializer


class MissingStatsError(ScopeCollectionNotFound, ScopeVariableNotFoundError):
    """Statistics are missing; a subclass of the errors that Flax raises."""

    def __init__(self, path: Sequence[str], reader: str, missing: str):
        # Flax would append a link to its own documentation of the class.
        collection = missing.split("/")[0]
        Exception.__init__(
            self,
            f"normjax at '/{'/'.join(path)}': {reader} needs {missing!r}, which the variables do "
            f"not have. model.init creates the collection {collection!r}, and training updates it. "
            f"Pass it with the parameters: model.apply({{'params': ..., {collection!r}: ...}}).",
        )


def adapter(module: Any) -> Adapter:
    """The adapter of a linen module."""

    def of_features(name: str, features: _errors.Features | None) -> Array:
        return param(module, name, features.shape if features else ())

    return Adapter(module, of_features, module.is_initializing())


def param(module: Any, name: str, shape: tuple[int, ...], path: str | None = None) -> Array:
    """The parameter `name`, which the module's `<name>_init` creates in its `param_dtype`."""
    init, dtype = getattr(module, f"{name}_init"), module.param_dtype
    expect_initializer(name, init, dtype)
    return module.param(path or name, init, shape, dtype)
