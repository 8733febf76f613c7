"""Normalization for JAX: pure functions that return their result and their new state.

Moments are a monoid: the moments of two pieces of data merge into the moments of both. So every
norm measures its data, merges the moments over pieces and devices, and normalizes by them. The
Flax modules are in `normjax.linen` and `normjax.nnx`, the tools for trained models in
`normjax.surgery`. They are imported on first use, so that `import normjax` does not need Flax.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from jax.export import register_namedtuple_serialization as _register

from normjax._choose import NormChoice, choose_normalization
from normjax._core.measure import measure
from normjax._core.moments import Moments, merge, synchronize
from normjax._core.normalize import normalize
from normjax._core.remat import norm_inputs_saveable
from normjax._functions import (
    ELU,
    LeakyReLU,
    SpectralStats,
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    batch_norm_act,
    batch_renorm,
    dynamic_tanh,
    filter_response_norm,
    group_norm,
    instance_norm,
    l2_normalize,
    layer_norm,
    local_response_norm,
    rms_norm,
    spectral_norm,
    standardize_weight,
    weight_norm,
)
from normjax._stats import BatchStats, move, update_stats

if TYPE_CHECKING:
    from normjax import linen as linen
    from normjax import nnx as nnx
    from normjax import surgery as surgery
else:

    def __getattr__(name: str):
        if name in ("linen", "nnx", "surgery"):
            return import_module(f"normjax.{name}")
        raise AttributeError(f"module 'normjax' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), "linen", "nnx", "surgery"})


__version__ = "0.1.0"

# The names under which jax.export serializes the states that a program takes and returns.
for _state in (BatchStats, Moments, SpectralStats):
    _register(_state, serialized_name=f"normjax.{_state.__name__}")

__all__ = [
    "ELU",
    "BatchStats",
    "LeakyReLU",
    "Moments",
    "NormChoice",
    "SpectralStats",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_norm_act",
    "batch_renorm",
    "choose_normalization",
    "dynamic_tanh",
    "filter_response_norm",
    "group_norm",
    "instance_norm",
    "l2_normalize",
    "layer_norm",
    "local_response_norm",
    "measure",
    "merge",
    "move",
    "norm_inputs_saveable",
    "normalize",
    "rms_norm",
    "spectral_norm",
    "standardize_weight",
    "synchronize",
    "update_stats",
    "weight_norm",
]
