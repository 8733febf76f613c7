"""What batch norm costs in a ResNet: parameters, time and memory.

python examples/evidence/cost.py            # a minute on two cores
python examples/evidence/cost.py --smoke    # a few seconds, to see that it runs
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import _evidence as evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _evidence import Claim, Conclusion, Options, processor, spread
from _training import cross_entropy
from jax import Array
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

import normjax.linen

CLAIM = Claim(
    title="Cost",
    text=(
        "Batch norm adds only two parameters for each feature, a share of a network that does not "
        "matter."
    ),
    source="Ioffe & Szegedy 2015, section 5 (arXiv:1502.03167)",
)
RESNET_50, IMAGE = (3, 4, 6, 3), 64
BATCH, SECONDS = 8, 3  # of each seed and network, spent on timing
# What does not matter, as a share of all parameters, and of the time or the memory of a step.
FEW, LITTLE = 0.01, 0.1


class ResNet(nn.Module):
    """ResNet-50 where `blocks` is RESNET_50 and `features` is 64 (He et al. 2015)."""

    blocks: Sequence[int]
    features: int
    norms: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(nn.Conv, use_bias=False)

        def norm(x: Array) -> Array:
            y: Array = normjax.linen.BatchNorm()(x, train=True) if self.norms else x
            return y

        x = nn.relu(norm(conv(self.features, (7, 7), (2, 2))(x)))
        window = (1, 3, 3, 1), (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *window, "SAME")
        for stage, count in enumerate(self.blocks):
            features = self.features * 2**stage
            for block in range(count):
                strides = (2, 2) if stage and not block else (1, 1)
                y = nn.relu(norm(conv(features, (1, 1))(x)))
                y = nn.relu(norm(conv(features, (3, 3), strides)(y)))
                y = norm(conv(4 * features, (1, 1))(y))
                if x.shape != y.shape:
                    x = norm(conv(4 * features, (1, 1), strides)(x))
                x = nn.relu(x + y)
        logits: Array = nn.Dense(1000)(x.mean((1, 2)))
        return logits


class Counted(NamedTuple):
    """Numbers of parameters."""

    convolutions: int
    dense: int
    norms: int
    running: int

    @property
    def share(self) -> float:
        """Of the parameters of norms; running statistics are no parameters."""
        return self.norms / (self.convolutions + self.dense + self.norms)


class Step(NamedTuple):
    """A training step with and without norms.

    Attributes:
        seconds: of the processor, of all threads; median with norms.
        shares: of the norms in the time, by seed; medians over pairs of steps.
        temporary: bytes with and without norms.
    """

    seconds: float
    shares: np.ndarray
    temporary: tuple[int, int]

    @property
    def time_share(self) -> float:
        return float(np.median(self.shares))

    @property
    def memory_share(self) -> float:
        return 1 - self.temporary[1] / self.temporary[0]


class Found(NamedTuple):
    full: Counted
    # Of smaller networks, by the features of their first layer.
    counted: dict[int, Counted]
    steps: dict[int, Step]


def shapes(model: ResNet) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, IMAGE, IMAGE, 3)))


def count(model: ResNet) -> Counted:
    """From shapes alone."""
    variables = shapes(model)

    def of(kind: str) -> int:
        layers = [layer for name, layer in variables["params"].items() if name.startswith(kind)]
        return sum(leaf.size for leaf in jax.tree.leaves(layers))

    running = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"]))
    return Counted(of("Conv"), of("Dense"), of("BatchNorm"), running)


def initial(model: ResNet) -> Any:
    """Random weights of He's deviation, by NumPy: the program of `model.init` compiles slowly."""
    generator = np.random.default_rng(0)

    def values(path: Any, leaf: Any) -> Array:
        name = path[-1].key
        if name == "kernel":
            weights = generator.standard_normal(leaf.shape, np.float32)
            return jnp.asarray(weights * np.sqrt(2 / np.prod(leaf.shape[:-1]), dtype=np.float32))
        return jnp.full(leaf.shape, float(name in ("scale", "var")))

    return jax.tree_util.tree_map_with_path(values, shapes(model))


def step(model: ResNet, variables: Any, images: Array, labels: Array) -> tuple[Array, Any]:
    """The loss, and the next variables after one step of SGD."""
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Any) -> tuple[Array, Any]:
        logits, moved = model.apply({"params": params, **state}, images, mutable=["batch_stats"])
        return cross_entropy(logits, labels), moved

    (value, moved), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    updated = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], gradients)
    return value, {"params": updated, **moved}


def crops(seed: int) -> tuple[Array, Array]:
    """BATCH random squares of the two photographs, with random labels."""
    generator = np.random.default_rng(seed)
    photographs = np.stack(load_sample_images().images) / np.float32(255)
    _, height, width, _ = photographs.shape
    squares = []
    for _ in range(BATCH):
        y, x = generator.integers(height - IMAGE), generator.integers(width - IMAGE)
        squares.append(photographs[generator.integers(2), y : y + IMAGE, x : x + IMAGE])
    return jnp.asarray(np.stack(squares)), jnp.asarray(generator.integers(0, 1000, BATCH))


def time_steps(blocks: Sequence[int], features: int, options: Options) -> Step:
    images, labels = crops(0)
    programs, starts, memory = [], [], []
    for norms in (True, False):
        model = ResNet(blocks, features, norms)
        starts.append(initial(model))
        programs.append(jax.jit(partial(step, model)).lower(starts[-1], images, labels).compile())
        analysis = programs[-1].memory_analysis()
        assert analysis is not None, "memory_analysis() is not available here"
        memory.append(analysis.temp_size_in_bytes)
    seconds, shares = [], []
    for seed in range(options.seeds):
        batch = crops(seed)
        pairs: list[list[float]] = []
        ends = time.process_time() + (0 if options.smoke else SECONDS)
        while not pairs or time.process_time() < ends:
            # Processor time, and in turn, so that what else the machine does matters little.
            pair = []
            for program, variables in zip(programs, starts, strict=True):
                started = time.process_time()
                value, _ = program(variables, *batch)
                value.block_until_ready()
                pair.append(time.process_time() - started)
            pairs.append(pair)
        with_norms, without = np.transpose(pairs)
        seconds.append(np.median(with_norms))
        shares.append(np.median(1 - without / with_norms))
    return Step(float(np.median(seconds)), np.array(shares), (memory[0], memory[1]))


def measure(options: Options) -> Found:
    blocks = (1,) if options.smoke else (1, 1, 1, 1)
    widths = (8,) if options.smoke else (16, 32, 64)
    counted = {width: count(ResNet(blocks, width)) for width in widths}
    steps = {width: time_steps(blocks, width, options) for width in widths}
    return Found(count(ResNet(RESNET_50, 64)), counted, steps)


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"


def conclude(found: Found) -> Conclusion:
    full, widest = found.full, found.steps[max(found.steps)]
    total = full.convolutions + full.dense + full.norms
    few = full.share < FEW
    little = widest.time_share < LITTLE and widest.memory_share < LITTLE
    rows = [["ResNet-50, counted only", f"{total:,}", percent(full.share), "", "", "", ""]]
    for width, taken in found.steps.items():
        counted = found.counted[width]
        rows.append(
            [
                f"1 block a stage, {width} features",
                f"{counted.convolutions + counted.dense + counted.norms:,}",
                percent(counted.share),
                f"{1000 * taken.seconds:.0f} ms",
                spread(100 * taken.shares, 1) + " %",
                f"{taken.temporary[0] / 1e6:.0f} MB",
                percent(taken.memory_share),
            ]
        )
    return Conclusion(
        held="yes" if few and little else "partly" if few else "no",
        number=(
            f"{percent(full.share)} of the parameters, {percent(widest.time_share)} of the time, "
            f"{percent(widest.memory_share)} of the memory"
        ),
        text=(
            f"ResNet-50 has {full.norms:,} scales and biases of norms among {total:,} parameters, "
            f"and {full.running:,} running statistics. A training step of a smaller ResNet (one "
            f"block a stage, {max(found.steps)} features in the first layer, {BATCH} images of "
            f"{IMAGE} x {IMAGE}) is compared with the same network without norms: norms take "
            f"{percent(widest.time_share)} of the processor time and "
            f"{percent(widest.memory_share)} of the temporary memory. These are seconds of all "
            f"threads of this {processor()}; other devices differ."
        ),
        header=[
            "network", "parameters", "of norms", "processor time of a step", "of norms",
            "temporary memory", "of norms",
        ],
        rows=rows,
    )  # fmt: skip


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    full = found.full
    bars = {
        "convolutions": full.convolutions,
        "dense layer": full.dense,
        "norms": full.norms,
        "running statistics": full.running,
    }
    left.barh(list(bars), list(bars.values()), color=["gray", "gray", "C0", "C4"])
    for row, value in enumerate(bars.values()):
        left.text(1.15 * value, row, f"{value:,}", va="center")
    left.invert_yaxis()
    left.grid(visible=False, axis="y")
    left.set(xscale="log", xlim=(1e4, 1e9), xlabel="numbers kept")
    left.set_title(f"ResNet-50: norms are {percent(full.share)}")
    widths = list(found.steps)
    shares = {
        "parameters": [found.counted[width].share for width in widths],
        "processor time": [found.steps[width].time_share for width in widths],
        "temporary memory": [found.steps[width].memory_share for width in widths],
    }
    for (label, values), color in zip(shares.items(), ("C0", "C1", "C2"), strict=True):
        right.plot(widths, 100 * np.array(values), marker="o", color=color, label=label)
    ranges = 100 * np.array([found.steps[width].shares for width in widths])
    right.fill_between(widths, ranges.min(1), ranges.max(1), color="C1", alpha=0.2)
    right.set_xscale("log", base=2)
    right.set_xticks(widths, [str(width) for width in widths])
    right.set(xlabel="features of the first layer (ResNet-50: 64)", ylabel="share of norms, %")
    right.set_ylim(min(0, right.get_ylim()[0]), 1.6 * right.get_ylim()[1])
    right.legend(loc="upper center")
    right.set_title("Training step of a smaller ResNet")
    figure.suptitle(f"Norms: {conclude(found).number}")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw)
