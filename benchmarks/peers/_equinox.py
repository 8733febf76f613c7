from __future__ import annotations

import equinox as eqx
import jax
from equinox import nn

from benchmarks.calls import Module
from benchmarks.layers import EPSILON, MOMENTUM


def norm_of(layer):
    if layer.kind == "layer_norm":
        return nn.LayerNorm(layer.features, eps=EPSILON)
    if layer.kind == "rms_norm":
        return nn.RMSNorm(layer.features, eps=EPSILON, use_bias=False)
    groups = layer.num_groups or layer.features
    return nn.GroupNorm(groups, layer.features, eps=EPSILON)


def batch_norm(layer):
    # mode="batch" stores the running averages without a correction.
    norm, state = nn.make_with_state(nn.BatchNorm)(
        layer.features, "batch", eps=EPSILON, momentum=MOMENTUM, mode="batch"
    )
    params, fixed = eqx.partition(norm, eqx.is_inexact_array)

    def apply(params, state, x, train):
        norm = nn.inference_mode(eqx.combine(params, fixed), not train)
        batched = jax.vmap(norm, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        y, state = batched(x, state)
        return y.astype(x.dtype), state

    return Module(apply, params, state, channels_first=len(layer.shape) > 2)


def module(layer, dtype):
    """Equinox has features first, and its modules take one example or one row of features."""
    if layer.kind == "batch_norm":
        return batch_norm(layer)
    of_rows = layer.kind in ("layer_norm", "rms_norm")
    params, fixed = eqx.partition(norm_of(layer), eqx.is_inexact_array)

    def apply(params, _, x, train):
        norm = eqx.combine(params, fixed)
        for _ in range(x.ndim - 1 if of_rows else 1):
            norm = jax.vmap(norm)
        return norm(x).astype(x.dtype), None

    return Module(apply, params, channels_first=not of_rows)
