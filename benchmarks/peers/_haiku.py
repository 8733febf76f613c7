from __future__ import annotations

import haiku as hk
import jax.numpy as jnp

from benchmarks.calls import Module
from benchmarks.layers import EPSILON, MOMENTUM


def norm_of(layer):
    if layer.kind == "batch_norm":
        return hk.BatchNorm(True, True, MOMENTUM, eps=EPSILON)
    if layer.kind == "layer_norm":
        return hk.LayerNorm(-1, True, True, eps=EPSILON)
    if layer.kind == "rms_norm":
        return hk.RMSNorm(-1, eps=EPSILON)
    if layer.kind == "group_norm":
        return hk.GroupNorm(layer.num_groups, eps=EPSILON)
    return hk.InstanceNorm(True, True, eps=EPSILON)


def module(layer, dtype):
    def forward(x, train):
        # Haiku's mixed precision policy for norms: float32 inside, output in the dtype of x.
        norm, wide = norm_of(layer), x.astype(jnp.float32)
        y = norm(wide, is_training=train) if layer.kind == "batch_norm" else norm(wide)
        return y.astype(x.dtype)

    network = hk.transform_with_state(forward)
    params, state = network.init(None, jnp.zeros(layer.example, dtype), True)
    # Haiku initializes running statistics from the first batch; others do not use a batch.
    for name in state:
        start = jnp.ones_like if name.endswith("var_ema") else jnp.zeros_like
        state[name]["average"] = start(state[name]["average"])

    def apply(params, state, x, train):
        return network.apply(params, state, None, x, train)

    return Module(apply, params, state)
