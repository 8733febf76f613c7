"""Code that all NNX modules share: their parameters, and their adapter for the functions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from normjax import _errors
from normjax._modules.adapter import Adapter, make_param

if not hasattr(nnx.Variable, "set_value"):
    raise ImportError(
        f"normjax.nnx: flax is {flax.__version__}, expected 0.12.1 or newer. Upgrade it: "
        "pip install --upgrade flax. The functions and normjax.linen work with yours."
    )

Metadata = Mapping[str, Any] | None
# Fields that may be lists.
LISTED = ("axis", "reduction_axes", "feature_axes", "axis_name", "axis_index_groups")


def adapter(module: Any, **options: Any) -> Adapter:
    """The adapter of an NNX module."""
    rule = getattr(module, "promote_dtype", promote_dtype)
    # The rule of Flax rounds x and the running statistics before they are used. Without it only y
    # is rounded, once, to the same dtype.
    rule = None if rule is promote_dtype else rule
    return Adapter(module, partial(held, module), promote=rule, **options)


def held(module: Any, name: str, features: _errors.Features | None = None) -> Any:
    """The value of a variable, in the shape of the features; without features a number."""
    value = _errors.restored(name, getattr(module, name).get_value())
    if features is None:
        return value
    _errors.num_features(name, value.shape, features)
    return value.reshape(features.shape)


def make(
    module: Any, name: str, init: Any, shape: tuple[int, ...], rngs: nnx.Rngs,
    metadata: Metadata = None,
) -> nnx.Param:  # fmt: skip
    """A new parameter of this shape, which `init` creates in the module's `param_dtype`."""
    _errors.random_streams(rngs)
    value = make_param(init, name, rngs.params(), shape, module.param_dtype)
    return nnx.Param(value, **(metadata or {}))


def make_static(module: Any) -> None:
    """Turns lists of axes into tuples: `nnx.graphdef` is a static argument and must be hashable."""
    for name in LISTED:
        if hasattr(module, name):
            setattr(module, name, _static(getattr(module, name)))


def _static(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return tuple(map(_static, value)) if isinstance(value, (list, tuple, set)) else value


def make_affine(module: Any, rngs: nnx.Rngs, **given: tuple[Any, Metadata]) -> None:
    """Creates the parameters that the module uses, each from an initializer and metadata."""
    make_static(module)
    shape = (_errors.feature_count(module.num_features),)
    for name, (init, metadata) in given.items():
        uses = getattr(module, f"use_{name}")
        value = make(module, name, init, shape, rngs, metadata) if uses else nnx.data(None)
        setattr(module, name, value)
