"""One adapter for each library, from a layer to that library's module of it.

Of a JAX library it has `module(layer, dtype)`, which returns a `benchmarks.calls.Module`; of
another one `calls(layer, x, dy)`, which builds what is timed, by mode.

Each layer is set up as a user of that library would: parameters in float32, output in the dtype
of x, epsilon and momentum the same for all. A library without such a layer raises `Missing`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

import normjax
from benchmarks.calls import Call, Module, jax_calls
from normjax._core.platforms.kernels import plugin


class Missing(Exception):
    """The library has no such layer, or not here."""


# Name in the table, as on the command line: adapter, function in it, distribution.
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
    """The function that builds the calls; ImportError where the library is not installed."""
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
    # Ours is the one that is imported, which need not be the one that is installed.
    if distribution != "normjax":
        return f"{name} {version(distribution)}"
    kernels = f" with normjax-cpu {version('normjax-cpu')}" if plugin() else " without kernels"
    return f"{name} {normjax.__version__}{kernels}"
