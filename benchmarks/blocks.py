"""Residual blocks, where XLA can fuse norms with the operations around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from benchmarks.models import Bottleneck, TransformerBlock

DEPTH = 2


class PreActivationBlock(nn.Module):
    """As in ResNet v2: norm and activation before each of two convolutions."""

    norm: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype)
        y = conv()(nn.relu(self.norm()(x)))
        return x + conv()(nn.relu(self.norm()(y)))


class UNetBlock(nn.Module):
    """As in the U-Net of a diffusion model, without the time embedding."""

    norm: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, x.shape[-1], (3, 3), dtype=self.dtype)
        y = conv()(nn.silu(self.norm()(x)))
        return x + conv()(nn.silu(self.norm()(y)))


class Repeated(nn.Module):
    """Blocks in sequence: with two, the end of the first can fuse with the start of the second."""

    block: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x):
        for _ in range(DEPTH):
            x = self.block()(x)
        return x


class Blocks(NamedTuple):
    """One row of the table: a kind of blocks on images or tokens of one shape, in bfloat16."""

    name: str
    make: Callable[[ModuleType], Callable[[], nn.Module]]
    shape: tuple[int, ...]

    @property
    def title(self) -> str:
        return f"{self.name} {self.shape}"

    def module(self, library: ModuleType) -> nn.Module:
        """The blocks with the norms of `library`: flax.linen or normjax.linen."""
        return Repeated(self.make(library))


DTYPE = jnp.bfloat16


def bottleneck(library: ModuleType, features: int = 128) -> Callable[[], nn.Module]:
    norm = partial(library.BatchNorm, use_running_average=False, momentum=0.9, dtype=DTYPE)
    return partial(Bottleneck, features, 1, norm, DTYPE)


def pre_activation(library: ModuleType) -> Callable[[], nn.Module]:
    norm = partial(library.BatchNorm, use_running_average=False, momentum=0.9, dtype=DTYPE)
    return partial(PreActivationBlock, norm, DTYPE)


def transformer(library: ModuleType) -> Callable[[], nn.Module]:
    return partial(TransformerBlock, library.LayerNorm, DTYPE)


def u_net(library: ModuleType) -> Callable[[], nn.Module]:
    return partial(UNetBlock, partial(library.GroupNorm, num_groups=32, dtype=DTYPE), DTYPE)


BLOCKS = (
    Blocks("2 bottlenecks", bottleneck, (64, 28, 28, 512)),
    Blocks("2 pre-activation blocks", pre_activation, (64, 28, 28, 128)),
    Blocks("2 transformer blocks", transformer, (16, 512, 768)),
    Blocks("2 U-Net blocks", u_net, (8, 32, 32, 320)),
)
