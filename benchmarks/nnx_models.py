"""The cost of norms in NNX models: training steps with the norms of Flax and of normjax.

python -m benchmarks.nnx_models                          # print the table
python -m benchmarks.nnx_models --out docs/results # and write it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import normjax.nnx
from benchmarks import machine, steps


class Bottleneck(nnx.Module):
    def __init__(self, before, features, strides, norm, dtype, rngs):
        conv = partial(nnx.Conv, use_bias=False, dtype=dtype, rngs=rngs)
        norm = partial(norm, dtype=dtype, rngs=rngs)
        self.conv1, self.norm1 = conv(before, features, (1, 1)), norm(features)
        self.conv2, self.norm2 = conv(features, features, (3, 3), strides), norm(features)
        self.conv3, self.norm3 = conv(features, 4 * features, (1, 1)), norm(4 * features)
        self.around = nnx.List([])
        if before != 4 * features:
            projection = conv(before, 4 * features, (1, 1), strides)
            self.around = nnx.List([projection, norm(4 * features)])

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        for layer in self.around:
            x = layer(x)
        return nnx.relu(x + y)


class ResNet50(nnx.Module):
    def __init__(self, norm, dtype, rngs, blocks=(3, 4, 6, 3), features=64):
        options = dict(use_bias=False, dtype=dtype, rngs=rngs)
        self.conv = nnx.Conv(3, features, (7, 7), (2, 2), **options)
        self.norm = norm(features, dtype=dtype, rngs=rngs)
        made, before = [], features
        for stage, count in enumerate(blocks):
            for block in range(count):
                width, strides = features * 2**stage, 2 if stage and not block else 1
                made.append(Bottleneck(before, width, strides, norm, dtype, rngs))
                before = 4 * width
        self.blocks = nnx.List(made)
        self.dense = nnx.Linear(before, 1000, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean((1, 2)))


class TransformerBlock(nnx.Module):
    """As in GPT-2: a norm before attention and before the two dense layers."""

    def __init__(self, norm, dtype, rngs, heads=12, width=768):
        options = dict(dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = norm(width, **options), norm(width, **options)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **options)
        self.dense1 = nnx.Linear(width, 4 * width, **options)
        self.dense2 = nnx.Linear(4 * width, width, **options)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.dense2(nnx.gelu(self.dense1(self.norm2(x))))


COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class OfLinen:
    """Gives an NNX model the methods of linen that `benchmarks.steps` calls."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self.make = make

    def init_with_output(self, key: Any, x: Any) -> Any:
        model = self.make(nnx.Rngs(0))
        return model(x), variables_of(model)

    def apply(self, variables: Any, x: Any, mutable: Sequence[str]) -> Any:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))
        for values in variables.values():
            nnx.replace_by_pure_dict(state, values)
        model = nnx.merge(graphdef, state)
        y = model(x)
        found = variables_of(model)
        return y, {name: found[name] for name in mutable}


def variables_of(model: nnx.Module) -> dict[str, Any]:
    return {name: nnx.to_pure_dict(nnx.state(model, kind)) for name, kind in COLLECTIONS.items()}


def with_norms(model: Callable[..., nnx.Module], kind: str) -> dict[str, Callable]:
    """The model with the norm of that name from each library, by library."""

    def variant(norm):
        return lambda dtype: OfLinen(lambda rngs: model(norm, jnp.dtype(dtype), rngs))

    libraries = {"flax.nnx": nnx, "normjax.nnx": normjax.nnx}
    return {name: variant(getattr(library, kind)) for name, library in libraries.items()}


MODELS = {
    "ResNet-50, 8 images of 64 x 64": (with_norms(ResNet50, "BatchNorm"), (8, 64, 64, 3)),
    "GPT-2 block, layer norm": (with_norms(TransformerBlock, "LayerNorm"), (8, 256, 768)),
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
    lines = [*steps.report("Whole models of NNX", found, args.repeats, "flax.nnx")]
    steps.write(lines, args.out, "nnx_models.md")
    return found


if __name__ == "__main__":
    main()
