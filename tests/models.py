"""Small networks for tests of tools that must work on models that use only Flax."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Block(nn.Module):
    """A residual block (He et al. 2016), post-activation."""

    features: int
    norm: Any

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, self.features, (3, 3), use_bias=False)
        y = nn.relu(self.norm()(conv()(x)))
        y = self.norm(name="last")(conv()(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network with any batch norm, Flax's by default; `wrap` may be nn.remat, nn.jit."""

    batch_norm: Any = nn.BatchNorm
    momentum: float = 0.9
    wrap: Any = lambda block: block

    @nn.compact
    def __call__(self, x, train):
        norm = partial(self.batch_norm, use_running_average=not train, momentum=self.momentum)
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(norm(name="stem_bn")(x))
        block = self.wrap(Block)
        x = block(4, norm, name="block_0")(x)
        x = block(4, norm, name="block_1")(x)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


NORMS = {"stem_bn", *(f"block_{i}/{n}" for i in (0, 1) for n in ("BatchNorm_0", "last"))}


def images(seed=0, n=8, offset=0.5):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(offset, 2.0, (n, 4, 4, 2)), jnp.float32)


# Compiled once for equal models.
@partial(jax.jit, static_argnums=0)
def initialize(model, key):
    return model.init(key, images()[:1], False)


@partial(jax.jit, static_argnums=0)
def train(model, variables, x):
    _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return {**variables, **updates}


def trained(model, seed=0, steps=3):
    """Variables whose running statistics and affine parameters are no longer those of init."""
    variables = initialize(model, jax.random.key(seed))
    for i in range(steps):
        variables = train(model, variables, images(seed=i))
    rng = np.random.default_rng(seed)

    def moved(path, leaf):
        if path[-1].key in ("scale", "bias"):
            return leaf + jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)
        return leaf

    params = jax.tree_util.tree_map_with_path(moved, variables["params"])
    return {**variables, "params": params}
