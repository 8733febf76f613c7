"""How fast is one layer of batch norm? Against flax.linen in one process, printed as Markdown.

    python benchmarks/speed.py                  # print the table
    python benchmarks/speed.py --out table.md   # and write it

Calls are interleaved in random order and compared by their medians: a machine that slows down
slows down both. The last column is what exactness costs: the time of `normjax.measure` over that
of the unstable formula E[x^2] - E[x]^2.
"""

import argparse
import platform
import random
import statistics
import sys
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import normjax

SHAPES = {
    "ResNet-50 stage 1": (32, 56, 56, 64),
    "ResNet-50 stage 2": (32, 28, 28, 256),
    "MLP": (8192, 512),
}


def with_flax(x, stats, scale, bias, train):
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": stats.mean, "var": stats.var},
    }
    norm = nn.BatchNorm(dtype=x.dtype)
    y, updates = norm.apply(variables, x, not train, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def with_normjax(x, stats, scale, bias, train):
    return normjax.batch_norm(x, stats, scale, bias, train=train)


def training_step(norm):
    @jax.jit
    def step(x, dy, stats, scale, bias):
        y, pullback, stats = jax.vjp(
            lambda x, s, b: norm(x, stats, s, b, train=True), x, scale, bias, has_aux=True
        )
        return y, stats, pullback(dy)

    return step


def evaluation(norm):
    return jax.jit(lambda x, dy, *rest: norm(x, *rest, train=False)[0])


def unstable_sums(x):
    x, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, (x * x).mean(axes) - mean * mean


def stable_sums(x):
    return normjax.measure(x, tuple(range(x.ndim - 1)))[1:]


def contenders():
    return {
        "train flax": training_step(with_flax),
        "train normjax": training_step(with_normjax),
        "eval flax": evaluation(with_flax),
        "eval normjax": evaluation(with_normjax),
        "sums unstable": jax.jit(lambda x, *rest: unstable_sums(x)),
        "sums normjax": jax.jit(lambda x, *rest: stable_sums(x)),
    }


def measure(shape, dtype, repeats):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(1, 1, shape), dtype) for _ in range(2))
    c = shape[-1]
    args = (x, dy, normjax.BatchStats.make(c), jnp.ones(c), jnp.zeros(c))
    calls = {name: partial(f, *args) for name, f in contenders().items()}
    times = {name: [] for name in calls}
    order = list(calls)
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def table(repeats):
    yield (
        "| layer | dtype | flax training step | normjax training step | flax / normjax "
        "| flax / normjax, evaluation | normjax sums / unstable sums |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name, shape in SHAPES.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            t = measure(shape, dtype, repeats)
            yield (
                f"| {name} {shape} | {jnp.dtype(dtype).name} | {t['train flax']:.1f} ms "
                f"| {t['train normjax']:.1f} ms | {t['train flax'] / t['train normjax']:.2f} "
                f"| {t['eval flax'] / t['eval normjax']:.2f} "
                f"| {t['sums normjax'] / t['sums unstable']:.2f} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=31, help="calls of each contender")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    lines = []
    for line in table(args.repeats):
        print(line, flush=True)
        lines.append(line)
    device = jax.devices()[0]
    lines += [
        "",
        f"{date.today()}, {device.device_kind} ({platform.machine()}), jax {jax.__version__}, "
        f"flax {version('flax')}; medians of {args.repeats} interleaved calls. A ratio above 1 "
        "means that normjax is faster, but in the last column that it is slower.",
    ]
    print(*lines[-2:], sep="\n", file=sys.stdout)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
