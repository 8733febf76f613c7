from __future__ import annotations

from functools import partial

import jax.numpy as jnp

import normjax
from benchmarks.calls import Module
from benchmarks.layers import EPSILON, MOMENTUM

NORMS = {
    "layer_norm": normjax.layer_norm,
    "rms_norm": normjax.rms_norm,
    "group_norm": normjax.group_norm,
    "instance_norm": normjax.instance_norm,
}


def module(layer, dtype):
    scale, bias = jnp.ones(layer.features), jnp.zeros(layer.features)
    if layer.kind == "batch_norm":

        def apply(params, stats, x, train):
            return normjax.batch_norm(
                x, stats, *params, train=train, momentum=MOMENTUM, epsilon=EPSILON
            )

        return Module(apply, (scale, bias), normjax.BatchStats.make(layer.features))

    norm = partial(NORMS[layer.kind], epsilon=EPSILON)
    if layer.kind == "group_norm":
        norm = partial(norm, num_groups=layer.num_groups)
    params = (scale,) if layer.kind == "rms_norm" else (scale, bias)
    return Module(lambda params, _, x, train: (norm(x, *params), None), params)
