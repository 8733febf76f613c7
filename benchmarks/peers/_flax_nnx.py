from __future__ import annotations

import jax
from flax import nnx

from benchmarks.calls import Module
from benchmarks.layers import EPSILON, MOMENTUM
from benchmarks.peers import Missing


def norm_of(layer, dtype):
    options = dict(epsilon=EPSILON, dtype=dtype, rngs=nnx.Rngs(0))
    if layer.kind == "batch_norm":
        return nnx.BatchNorm(layer.features, momentum=MOMENTUM, **options)
    if layer.kind == "layer_norm":
        return nnx.LayerNorm(layer.features, **options)
    if layer.kind == "rms_norm":
        return nnx.RMSNorm(layer.features, **options)
    if layer.kind == "group_norm":
        return nnx.GroupNorm(layer.features, layer.num_groups, **options)
    if not hasattr(nnx, "InstanceNorm"):
        raise Missing("this flax.nnx has no instance norm")
    return nnx.InstanceNorm(layer.features, **options)


def module(layer, dtype):
    graph, params, state = nnx.split(norm_of(layer, dtype), nnx.Param, ...)
    has_mode = layer.kind == "batch_norm"

    def apply(params, state, x, train):
        # A variable may change only in the trace that created it, so this creates new ones.
        norm = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, state))
        y = norm(x, use_running_average=not train) if has_mode else norm(x)
        return y, nnx.state(norm, nnx.BatchStat)

    return Module(apply, params, state)
