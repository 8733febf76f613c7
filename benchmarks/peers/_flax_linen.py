from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.calls import Module
from benchmarks.layers import EPSILON, MOMENTUM


def norm_of(layer, dtype):
    if layer.kind == "batch_norm":
        return nn.BatchNorm(momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype)
    if layer.kind == "layer_norm":
        return nn.LayerNorm(epsilon=EPSILON, dtype=dtype)
    if layer.kind == "rms_norm":
        return nn.RMSNorm(epsilon=EPSILON, dtype=dtype)
    if layer.kind == "group_norm":
        return nn.GroupNorm(layer.num_groups, epsilon=EPSILON, dtype=dtype)
    return nn.InstanceNorm(epsilon=EPSILON, dtype=dtype)


def module(layer, dtype):
    norm = norm_of(layer, dtype)
    with_mode = {"use_running_average": True} if layer.kind == "batch_norm" else {}
    x = jnp.zeros(layer.example, dtype)
    variables = jax.jit(lambda x: norm.init(jax.random.key(0), x, **with_mode))(x)
    params, state = variables["params"], variables.get("batch_stats")

    def apply(params, state, x, train):
        if state is None:
            return norm.apply({"params": params}, x), None
        variables = {"params": params, "batch_stats": state}
        if not train:
            return norm.apply(variables, x, use_running_average=True), state
        y, updates = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    return Module(apply, params, state)
