"""One adapter for each library: it builds the library's module for a layer.

The adapter of a JAX library has `module(layer, dtype)`, which returns a `benchmarks.calls.Module`.
That of another library has `calls(layer, x, dy)`, which returns the calls to time, by mode.

Each layer is set up as a user of that library would do it: parameters in float32, output in the
dtype of x. epsilon and momentum are the same for all. If a library has no such layer, its adapter
raises `Missing`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

import normjax
from benchmarks.calls import Call, Module, jax_calls
from normjax._core.platforms.kernels import plugin


class Missing(Exception):
    """The library has no such layer, or does not support it here."""


# The name in tables and on the command line: adapter, function in the adapter, distribution.
PEERS = {
    "normjax": ("_normjax", "module", "normjax"),
    "flax.linen": ("_flax_linen", "module", "flax"),
    "flax.nnx": ("_flax_nnx", "module", "flax"),
    "haiku": ("_haiku", "module", "dm-haiku"),
    "equinox": ("_equinox", "module", "equinox"),
    "keras": ("_keras", "module", "keras"),
    "torch": ("_torch", "calls", "torch"),
    "torch.channels_last": ("_torch", "channels_last_calls", "torch"),
    "torch.compile": ("_torch", "compiled_calls", "torch"),
}
BASELINE = "normjax"


def load(name: str) -> Callable[..., dict[str, Call]]:
    """The function that builds the calls; ImportError if the library is not installed."""
    adapter, function, _ = PEERS[name]
    build = getattr(import_module(f"benchmarks.peers.{adapter}"), function)
    if function != "module":
        return build
    return lambda layer, x, dy: jax_calls(build(layer, x.dtype), x, dy)


def load_module(name: str) -> Callable[..., Module]:
    """The function that builds a JAX library's module, from a layer and a dtype."""
    return import_module(f"benchmarks.peers.{PEERS[name][0]}").module


def described(name: str) -> str:
    distribution = PEERS[name][2]
    # The imported normjax need not be the installed one.
    if distribution != "normjax":
        return f"{name} {version(distribution)}"
    kernels = f" with normjax-cpu {version('normjax-cpu')}" if plugin() else " without kernels"
    return f"{name} {normjax.__version__}{kernels}"
