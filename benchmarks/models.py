"""The cost of norms in whole models: training steps with the norms of Flax and of normjax.

python -m benchmarks.models                          # print the table
python -m benchmarks.models --out docs/results # and write it
python -m benchmarks.models --only ResNet --dtype float32
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import normjax.linen
from benchmarks import machine, steps


class Bottleneck(nn.Module):
    features: int
    strides: int
    norm: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        strides = (self.strides, self.strides)
        y = nn.relu(self.norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.features, (3, 3), strides)(y)))
        y = self.norm()(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.features, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    norm: Callable[..., nn.Module]
    dtype: Any
    blocks: Sequence[int] = (3, 4, 6, 3)
    features: int = 64

    @nn.compact
    def __call__(self, x):
        norm = partial(self.norm, use_running_average=False, dtype=self.dtype)
        x = nn.Conv(self.features, (7, 7), (2, 2), use_bias=False, dtype=self.dtype)(x)
        x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                strides = 2 if stage and not block else 1
                x = Bottleneck(self.features * 2**stage, strides, norm, self.dtype)(x)
        return nn.Dense(1000, dtype=self.dtype)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """ConvNeXt-T of Liu et al. 2022: layer norm over the features of each position."""

    norm: Callable[..., nn.Module]
    dtype: Any
    blocks: Sequence[int] = (3, 3, 9, 3)
    features: int = 96

    @nn.compact
    def __call__(self, x):
        norm, dense = (partial(layer, dtype=self.dtype) for layer in (self.norm, nn.Dense))
        conv = partial(nn.Conv, dtype=self.dtype)
        for stage, count in enumerate(self.blocks):
            features = self.features * 2**stage
            if stage:
                x = conv(features, (2, 2), (2, 2))(norm()(x))
            else:
                x = norm()(conv(features, (4, 4), (4, 4))(x))
            for _ in range(count):
                y = norm()(conv(features, (7, 7), feature_group_count=features)(x))
                x = x + dense(features)(nn.gelu(dense(4 * features)(y)))
        return dense(1000)(norm()(x.mean((1, 2))))


class TransformerBlock(nn.Module):
    """As in GPT-2: a norm before attention and before the two dense layers."""

    norm: Callable[..., nn.Module]
    dtype: Any
    heads: int = 12

    @nn.compact
    def __call__(self, x):
        norm, width = partial(self.norm, dtype=self.dtype), x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(norm()(x))
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(norm()(x)))
        return x + nn.Dense(width, dtype=self.dtype)(y)


def with_norms(model: Callable[..., nn.Module], kind: str) -> dict[str, Callable]:
    """The model with the norm of that name from each library, by library."""

    def variant(norm):
        return lambda dtype: model(norm, jnp.dtype(dtype))

    libraries = {"flax.linen": nn, "normjax.linen": normjax.linen}
    return {name: variant(getattr(library, kind)) for name, library in libraries.items()}


MODELS = {
    "ResNet-50, 8 images of 64 x 64": (with_norms(ResNet50, "BatchNorm"), (8, 64, 64, 3)),
    "ConvNeXt-T, 8 images of 64 x 64": (with_norms(ConvNeXt, "LayerNorm"), (8, 64, 64, 3)),
    "GPT-2 block, layer norm": (with_norms(TransformerBlock, "LayerNorm"), (8, 256, 768)),
    "GPT-2 block, RMS norm": (with_norms(TransformerBlock, "RMSNorm"), (8, 256, 768)),
}


def main(argv: Sequence[str] | None = None, models: dict = MODELS) -> list[steps.Step]:
    args = steps.arguments(__doc__.split("\n")[0], argv)
    machine.prepare()
    found = []
    for name, (variants, shape) in models.items():
        if any(word in name for word in args.only):
            x = np.random.default_rng(0).normal(0, 1, shape)
            for dtype in args.dtype:
                found += steps.compare(name, variants, x, dtype, args.repeats, args.seconds)
    steps.write([*steps.report("Whole models", found, args.repeats)], args.out, "models.md")
    return found


if __name__ == "__main__":
    main()
