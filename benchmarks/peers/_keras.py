from __future__ import annotations

import keras
from keras import layers

from benchmarks.calls import Module
from benchmarks.layers import EPSILON, MOMENTUM


def norm_of(layer, dtype):
    policy = "float32" if dtype == "float32" else f"mixed_{dtype}"
    options = dict(epsilon=EPSILON, dtype=policy)
    if layer.kind == "batch_norm":
        return layers.BatchNormalization(momentum=MOMENTUM, **options)
    if layer.kind == "layer_norm":
        return layers.LayerNormalization(**options)
    if layer.kind == "rms_norm":
        return layers.RMSNormalization(**options)
    # Keras has no instance norm, but groups=-1 in its group norm means one group for each feature.
    return layers.GroupNormalization(layer.num_groups or -1, **options)


def module(layer, dtype):
    if keras.backend.backend() != "jax":
        raise ImportError(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=jax")
    norm = norm_of(layer, dtype.name)
    norm.build(layer.shape)
    params = [v.value for v in norm.trainable_variables]
    state = [v.value for v in norm.non_trainable_variables]

    def apply(params, state, x, train):
        # Only batch norm has two modes.
        mode = {"training": train} if layer.kind == "batch_norm" else {}
        return norm.stateless_call(params, state, x, **mode)

    return Module(apply, params, state)
