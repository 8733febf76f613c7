"""What every module of linen does alike: its parameters, and statistics that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax.errors import ScopeCollectionNotFound, ScopeVariableNotFoundError
from jax import Array

from normjax import _errors
from normjax._modules.shell import Shell, expect_initializer


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


def shell(module: Any) -> Shell:
    """A module of linen, as the functions see it."""

    def of_features(name: str, features: _errors.Features | None) -> Array:
        return param(module, name, features.shape if features else ())

    return Shell(module, of_features, module.is_initializing())


def param(module: Any, name: str, shape: tuple[int, ...], path: str | None = None) -> Array:
    """The parameter `name`, which the module's `<name>_init` makes in its `param_dtype`."""
    init, dtype = getattr(module, f"{name}_init"), module.param_dtype
    expect_initializer(name, init, dtype)
    return module.param(path or name, init, shape, dtype)
