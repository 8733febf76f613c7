"""Axes made canonical; every error of shape, dtype, range and mode is worded here alone.

Each message says what was called, what it got, what it expected and what to do.
"""

from normjax._checks.arrays import (
    affine,
    axes,
    broadcast,
    entries,
    feature_vector,
    features,
    inexact,
    mask,
    matrix,
    number_of_groups,
    output_dtype,
    reduced_axes,
    something,
)
from normjax._checks.devices import axis_size, collectives, groups
from normjax._checks.options import (
    batch_stats,
    bound,
    count,
    ddof,
    epsilon,
    mode,
    momentum,
    moves,
    only_matrix,
    stored_count,
    switch,
    virtual_batches,
)

__all__ = [
    "affine",
    "axes",
    "axis_size",
    "batch_stats",
    "bound",
    "broadcast",
    "collectives",
    "count",
    "ddof",
    "entries",
    "epsilon",
    "feature_vector",
    "features",
    "groups",
    "inexact",
    "mask",
    "matrix",
    "mode",
    "momentum",
    "moves",
    "number_of_groups",
    "only_matrix",
    "output_dtype",
    "reduced_axes",
    "something",
    "stored_count",
    "switch",
    "virtual_batches",
]
