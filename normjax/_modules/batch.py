"""Batch norms: one call of a module that keeps running statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array

from normjax import _errors
from normjax._core.moments import Moments, merge
from normjax._functions import batch, renorm
from normjax._functions.batch import Arguments
from normjax._modules.adapter import Adapter, Call, output_dtype
from normjax._stats import BatchStats

# Options of a function that not all batch norms have.
EXTRAS = ("virtual_batch_size", "activation", "r_max", "d_max")


class Memory(NamedTuple):
    """The state of a module between calls.

    Attributes:
        stats: the running statistics.
        moments: of micro-batches that the statistics do not include yet; None if this call keeps
            no moments.
    """

    stats: BatchStats
    moments: Moments | None


def read(fields: Any, call: Call) -> tuple[Call, _errors.Features]:
    """The call with x as an array, and the features of x."""
    x = _errors.inexact("x", call.x)
    call = call._replace(x=x, mask=_errors.nonzero(call.mask))
    return call, _errors.features(x.shape, fields.axis)


def needs_count(fields: Any) -> bool:
    """Whether an update of the running statistics needs the number of earlier ones."""
    scheduled = any(callable(getattr(fields, name, None)) for name in ("r_max", "d_max"))
    return _errors.switch("debias", fields.debias) or fields.momentum is None or scheduled


def step(
    adapter: Adapter, call: Call, features: _errors.Features, mode: _errors.Mode, memory: Memory,
    moves: bool,
) -> tuple[Array, Memory]:  # fmt: skip
    """y and the new state of the module; `moves` if the running statistics are updated."""
    fields, x = adapter.fields, call.x
    scale, bias = adapter.affine(features, call)
    mean, var, count = memory.stats
    x, mean, var, scale, bias = adapter.promoted(x, mean, var, scale, bias)
    train = mode.train and not adapter.initializing
    stats: BatchStats | None = memory.stats if train else BatchStats(mean, var, count)
    devices = dict(axis_name=None, axis_index_groups=None) | adapter.devices()
    if train:
        # The function checks it too, but does not know by which name the mode was given.
        name, groups = devices["axis_name"], devices["axis_index_groups"]
        shared = 1 if name is None else _errors.axis_size(name, groups)
        _errors.entries(x.shape, features.reduced, shared, mode)
    elif mode.train:
        # Init accepts any batch, also of one example: it normalizes by that batch, keeps no
        # statistics and needs no device axis.
        stats = None
    in_dtype = (x, mean, var, scale, bias) if adapter.promotes_stats else (x, scale, bias)
    extras = {name: getattr(fields, name) for name in EXTRAS if hasattr(fields, name)}
    arguments = Arguments(
        x=x,
        stats=stats,
        scale=scale,
        bias=bias,
        train=train,
        feature_axis=fields.axis,
        momentum=fields.momentum,
        epsilon=fields.epsilon,
        ddof=fields.ddof,
        debias=fields.debias,
        mask=call.mask,
        dtype=output_dtype(fields.dtype, *in_dtype),
        **devices,
        **extras,
    )
    # In init there are no statistics to correct towards.
    corrected = "r_max" in extras and stats is not None
    y, moments = (renorm if corrected else batch).run(arguments)
    return y, _after(arguments, memory, moments, moves)


def _after(arguments: Arguments, memory: Memory, moments: Moments | None, moves: bool) -> Memory:
    """The new state: moments merged with those of this batch, or updated statistics."""
    if moments is None or not arguments.train:
        return memory
    kept = memory.moments
    if kept is not None:
        moments = merge(kept, moments)
        kept = Moments.make(moments.mean.shape) if moves else moments
    stats = arguments.moved(moments) if moves else memory.stats
    return Memory(stats, kept)
