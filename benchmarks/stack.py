"""The memory of a deep stack of convolution, batch norm and activation.

    python -m benchmarks.stack                           # print the table
    python -m benchmarks.stack --out docs/results  # and write it

To measure another method to save memory, add a line to VARIANTS.
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

DEPTH, SHAPE = 16, (8, 32, 32, 64)


class Block(nn.Module):
    """Submodules have names, not numbers, so that all variants have the same variables."""

    norm: Callable[..., nn.Module]
    activation: Callable
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype, name="conv")(x)
        x = self.norm(use_running_average=False, dtype=self.dtype, name="norm")(x)
        return self.activation(x)


class ActivatedBlock(nn.Module):
    """Norm and activation in one module."""

    activation: Callable
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype, name="conv")(x)
        how = {"use_running_average": False, "dtype": self.dtype, "activation": self.activation}
        return normjax.linen.BatchNormAct(**how, name="norm")(x)


class Stack(nn.Module):
    block: Callable[..., nn.Module]
    depth: int = DEPTH

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = self.block(name=f"block_{i}")(x)
        return x


class Scanned(nn.Module):
    """The same with `nn.scan`, which every compiler keeps as a loop over the layers."""

    block: Callable[..., nn.Module]
    depth: int = DEPTH

    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return module.block(name="block")(x), None

        axes = {"params": 0, "batch_stats": 0}
        scan = nn.scan(layer, axes, split_rngs={"params": True}, length=self.depth)
        return scan(self, x, None)[0]


def block(cls: type[nn.Module], norm: Callable[..., nn.Module]) -> Callable:
    """A variant: blocks of this class with this norm."""
    return lambda activation, dtype: partial(cls, norm, activation, dtype)


# By name: a function of an activation and a dtype. It returns a function from a name to a block.
VARIANTS = {
    "flax.linen": block(Block, nn.BatchNorm),
    "normjax.linen": block(Block, normjax.linen.BatchNorm),
    "normjax.linen.BatchNormAct": lambda activation, dtype: partial(
        ActivatedBlock, activation, dtype
    ),
    "normjax.linen, norm_inputs_saveable": block(
        nn.remat(Block, policy=normjax.norm_inputs_saveable), normjax.linen.BatchNorm
    ),
    "flax.linen, nn.remat": block(nn.remat(Block), nn.BatchNorm),
}

ACTIVATIONS = {"ReLU": nn.relu, "leaky ReLU": normjax.LeakyReLU(), "ELU": normjax.ELU()}


def main(
    argv: Sequence[str] | None = None, depth: int = DEPTH, shape: tuple[int, ...] = SHAPE
) -> list[steps.Step]:
    args = steps.arguments(__doc__.split("\n")[0], argv)
    machine.prepare()
    found = []
    for stack, how, scale in ((Stack, "", 1), (Scanned, ", nn.scan", 2)):
        # Convolutions in a loop are slow on a CPU, so their input is smaller. Shares of memory do
        # not depend on the size.
        x = np.random.default_rng(0).normal(0, 1, (*(n // scale for n in shape[:3]), shape[3]))
        for activation, function in ACTIVATIONS.items():
            name = f"{depth} x (convolution, batch norm, {activation}){how}"
            variants = {
                variant: lambda dtype, stack=stack, make=make, function=function: stack(
                    make(function, jnp.dtype(dtype)), depth
                )
                for variant, make in VARIANTS.items()
            }
            if any(word in name for word in args.only):
                for dtype in args.dtype:
                    found += steps.compare(name, variants, x, dtype, args.repeats, args.seconds)
    steps.write([*steps.report("Deep stacks", found, args.repeats)], args.out, "stack.md")
    return found


if __name__ == "__main__":
    main()
