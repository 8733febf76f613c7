"""One adapter for each library: `calls(layer, x, dy)` builds what is timed, by mode.

Each layer is set up as a user of that library would: parameters in float32, output in the dtype
of x, epsilon and momentum the same for all. A library without such a layer raises `Missing`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

import normjax


class Missing(Exception):
    """The library has no such layer, or not here."""


# Name in the table, as on the command line: adapter, function in it, distribution.
PEERS = {
    "normjax": ("_normjax", "calls", "normjax"),
    "flax.linen": ("_flax_linen", "calls", "flax"),
    "flax.nnx": ("_flax_nnx", "calls", "flax"),
    "haiku": ("_haiku", "calls", "dm-haiku"),
    "equinox": ("_equinox", "calls", "equinox"),
    "keras": ("_keras", "calls", "keras"),
    "torch": ("_torch", "calls", "torch"),
    "torch.channels_last": ("_torch", "channels_last_calls", "torch"),
    "torch.compile": ("_torch", "compiled_calls", "torch"),
}
BASELINE = "normjax"


def load(name: str) -> Callable:
    """The function that builds the calls; ImportError where the library is not installed."""
    adapter, function, _ = PEERS[name]
    return getattr(import_module(f"benchmarks.peers.{adapter}"), function)


def described(name: str) -> str:
    distribution = PEERS[name][2]
    # Ours is the one that is imported, which need not be the one that is installed.
    number = normjax.__version__ if distribution == "normjax" else version(distribution)
    return f"{name} {number}"
