"""A deep dense network for the evidence scripts, with batch norms and their running statistics.

The hidden layers are stacked, one row of each array a layer, and applied with `jax.lax.scan`: 50
layers compile as fast as one.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from _training import dense_layers, digits
from jax import Array

import normjax

WIDTH, BATCH = 64, 64
# The loss of a network that has learned nothing is log(10) = 2.3.
LEARNED = 0.1

# Halves the time of compilation. What is compiled is as fast, since matrix products take the time.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})

Layer = dict[str, Array]


class Network(NamedTuple):
    """Layers of weight and bias, each with the scale and shift of a norm."""

    stem: Layer
    hidden: Layer
    head: Layer


class Running(NamedTuple):
    """Running statistics of the norms of a `Network`."""

    stem: normjax.BatchStats
    hidden: normjax.BatchStats


def network(key: Array, depth: int, gain: float | Array = 1.0) -> Network:
    """`depth` layers, the stem among them, and the head; weights of He's deviation times `gain`."""
    of_stem, of_hidden, of_head = jax.random.split(key, 3)

    def layer(key: Array, fan_in: int, features: int) -> Layer:
        return dense_layers(key, [fan_in, features], gain)[0]

    # All hidden layers in one call, which compiles faster than one call for each.
    hidden = jax.vmap(partial(layer, fan_in=WIDTH, features=WIDTH))
    return Network(
        layer(of_stem, digits().images[0].size, WIDTH),
        hidden(jax.random.split(of_hidden, depth - 1)),
        layer(of_head, WIDTH, 10),
    )


def running(depth: int) -> Running:
    make = normjax.BatchStats.make
    return Running(make(WIDTH), make((depth - 1, WIDTH)))


def flat(images: Array) -> Array:
    return images.reshape(len(images), -1)


def dense(x: Array, layer: Layer) -> Array:
    return x @ layer["weight"] + layer["bias"]


def batch_norm(
    x: Array, layer: Layer, stats: normjax.BatchStats, train: bool
) -> tuple[Array, normjax.BatchStats]:
    scale, shift = layer["scale"], layer["shift"]
    return normjax.batch_norm(x, stats, scale, shift, train=train, momentum=0.9)


def last(losses: Array) -> Array:
    """Mean of the last 20 losses; infinite where training diverged."""
    return jnp.nan_to_num(losses[..., -20:].mean(-1), nan=jnp.inf, posinf=jnp.inf)
