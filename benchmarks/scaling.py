"""The cost of shared statistics on many devices: counted, measured on simulated ones, projected.

    python -m benchmarks.scaling                                        # print the tables
    python -m benchmarks.scaling --out docs/results/scaling.md    # and write them, with a plot, and
                                                            # the table in docs/scaling.md

Collectives and their bytes are read from the compiled program. Times are measured on devices that
are simulated on a few cores and share memory. They show that the share of a step does not grow, but
nothing about a network. docs/scaling.md has a model for thousands of devices.
"""

import argparse
import os
import platform
import random
import re
import time
from datetime import date
from functools import partial
from math import log2
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax
import normjax.linen
from benchmarks import hlo
from benchmarks.picture import in_style

DEVICES = (1, 2, 4, 8)
FEATURES = 256

# The 53 batch norms of ResNet-50: the stem, then blocks of three in each stage. The first block of
# a stage has one more in its shortcut.
RESNET50 = [64] + [
    features
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3))
    for features in [width, width, 4 * width] * blocks + [4 * width]
]
STEP_MS = 25  # one step of ResNet-50 with 64 images on each device, at 2,500 images a second
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
HOST = 8  # devices that fast links connect


class Traffic(NamedTuple):
    """The collectives of a usual run of a program, and the bytes that they reduce.

    If the running mean is far from the batch mean, batch norm needs a second pass with two more.
    """

    number: int
    bytes: int

    def __sub__(self, other):
        return Traffic(self.number - other.number, self.bytes - other.bytes)


def traffic(program, *args):
    found = hlo.parse(program.lower(*args).compile().as_text()).usual_collectives()
    return Traffic(len(found), sum(collective.bytes for collective in found))


def loss(x, scale, bias, axis_name):
    stats = normjax.BatchStats.make(x.shape[-1])
    y, stats = normjax.batch_norm(x, stats, scale, bias, train=True, axis_name=axis_name)
    # The loss is not linear in y, so no part of backward can run in the forward pass.
    return jnp.sum(jnp.sin(y)), (y, stats)


def mesh_of(devices):
    return Mesh(jax.devices()[:devices], ("batch",))


def layer_under_shard_map(devices):
    """The forward pass, and both passes with the gradients of x, scale and bias."""

    def forward(x, scale, bias):
        return loss(x, scale, bias, "batch")[1]

    def both(x, scale, bias):
        local = lambda *args: lax.psum(loss(*args, "batch")[0], "batch")  # noqa: E731
        return jax.grad(local, (0, 1, 2))(x, scale, bias)

    rows, whole = P("batch"), P()
    share = partial(jax.shard_map, mesh=mesh_of(devices), in_specs=(rows, whole, whole))
    args = jnp.ones((16, 8, 8, FEATURES)), *jnp.ones((2, FEATURES))
    return (
        traffic(jax.jit(share(forward, out_specs=(rows, whole))), *args),
        traffic(jax.jit(share(both, out_specs=(rows, whole, whole))), *args),
    )


def layer_under_jit(devices):
    mesh = mesh_of(devices)
    x = jax.device_put(jnp.ones((16, 8, 8, FEATURES)), NamedSharding(mesh, P("batch")))
    vectors = jax.device_put(tuple(jnp.ones((2, FEATURES))), NamedSharding(mesh, P()))
    both = jax.grad(lambda *args: loss(*args, None)[0], (0, 1, 2))
    return (
        traffic(jax.jit(lambda *args: loss(*args, None)[1]), x, *vectors),
        traffic(jax.jit(both), x, *vectors),
    )


WAYS = {"shard_map": layer_under_shard_map, "jit over sharded rows": layer_under_jit}


def traffic_table():
    yield "| way | devices | forward: collectives | bytes | backward: collectives | bytes |"
    yield "|---|---|---|---|---|---|"
    for name, way in WAYS.items():
        for devices in DEVICES:
            forward, both = way(devices)
            # The loss itself reduces one number, which is not part of the layer.
            backward = both - forward
            yield (
                f"| {name} | {devices} | {forward.number} | {forward.bytes} "
                f"| {backward.number} | {backward.bytes} |"
            )


class Stack(nn.Module):
    """Four convolutions with batch norm, of a size as in the middle of a residual network."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = nn.Conv(32, (3, 3), use_bias=False)(x)
            x = nn.relu(normjax.linen.BatchNorm(axis_name=self.axis_name)(x, train=True))
        return x


def stack_step(devices, axis_name):
    """A training step without an optimizer; in both cases gradients are summed over devices."""
    model = Stack(axis_name)
    images = jax.random.normal(jax.random.key(0), (8 * devices, 16, 16, 32))
    variables = model.init(jax.random.key(1), images[:2])

    def step(variables, images):
        def whole(params):
            merged = {**variables, "params": params}
            y, updates = model.apply(merged, images, mutable=["batch_stats"])
            return lax.psum(jnp.sum(y * y), "batch"), updates

        return jax.grad(whole, has_aux=True)(variables["params"])

    mesh, rows = mesh_of(devices), P("batch")
    shared = jax.shard_map(step, mesh=mesh, in_specs=(P(), rows), out_specs=(P(), rows))
    variables = jax.device_put(variables, NamedSharding(mesh, P()))
    images = jax.device_put(images, NamedSharding(mesh, rows))
    return partial(jax.jit(shared), variables, images)


def time_table(repeats):
    yield "| devices | own statistics | shared statistics | share of the step |"
    yield "|---|---|---|---|"
    for devices in DEVICES:
        steps = {name: stack_step(devices, name) for name in (None, "batch")}
        times = {name: [] for name in steps}
        for step in steps.values():
            jax.block_until_ready(step())
        for _ in range(repeats):
            for name in random.sample(list(steps), len(steps)):
                start = time.perf_counter()
                jax.block_until_ready(steps[name]())
                times[name].append(1e3 * (time.perf_counter() - start))
        # The least time, since other processes delay threads that wait for each other.
        own, shared = (min(times[name]) for name in (None, "batch"))
        yield f"| {devices} | {own:.1f} ms | {shared:.1f} ms | {1 - own / shared:.0%} |"


def ring(devices, size):
    """Microseconds of NCCL's ring, with the latencies in its tuning model (src/graph/tuning.cc).

    2 (p - 1) messages in sequence, most of them within a host.
    """
    hosts = max(1, devices // HOST)
    inside = 0.47 * (1.8 if hosts > 1 else 1)
    latency = 3.6 + 2 * (devices - hosts) * inside + 2 * (hosts - 1) * 2.7
    return latency + 2 * (devices - 1) / devices * size / 12.5e3


def tree(devices, size):
    """The same for NCCL's tree: up and down a chain in each host and a binary tree over hosts."""
    hosts = max(1, devices // HOST)
    inside = 0.52 * (1.8 if hosts > 1 else 1)
    latency = 4.4 + 2 * ((min(devices, HOST) - 1) * inside + log2(hosts) * 5.0)
    return latency + 2 * size / 12.5e3


def torus(devices, size):
    """TPUs in a cube: half of each side and back, 1 microsecond for a hop (the scaling book)."""
    side = round(devices ** (1 / 3))
    return 2 * max(3 * side / 2 * 1.0, size / 1.8e5)


NETWORKS = {"ring of GPUs": ring, "tree of GPUs": tree, "torus of TPUs": torus}


def projected(network, devices, passes):
    """The milliseconds that a step of ResNet-50 waits for its statistics."""
    total = 0.0
    for features in RESNET50:
        for number, size in passes:
            one = size / number * features / FEATURES
            total += number * network(devices, one)
    return total / 1e3


def layer_passes():
    forward, both = layer_under_shard_map(8)
    return [part for part in (forward, both - forward) if part.number]


def projection_table():
    passes = layer_passes()
    yield "| devices that share | " + " | ".join(NETWORKS) + " |"
    yield "|---|" + "---|" * len(NETWORKS)
    for devices in (8, 64, 512, 4096):
        waits = [projected(network, devices, passes) for network in NETWORKS.values()]
        cells = [f"{wait:.2f} ms ({wait / STEP_MS:.0%})" for wait in waits]
        yield f"| {devices} | " + " | ".join(cells) + " |"


def draw(path):
    from matplotlib.figure import Figure

    passes = layer_passes()
    counts = [8, 64, 512, 4096]
    longest, groups = 0.0, []
    with in_style():
        figure = Figure(figsize=(8, 4.5))
        axis = figure.subplots()
        for color, (name, network) in enumerate(NETWORKS.items()):
            waits = [projected(network, devices, passes) for devices in counts]
            axis.plot(counts, waits, "o-", color=f"C{color}", label=name)
            axis.plot(counts, [waits[0]] * len(counts), ":", color=f"C{color}")
            longest = max(longest, *waits)
            groups.append(waits[0])
        axis.axhline(STEP_MS, color="gray", lw=0.8, ls="--")
        axis.text(counts[0], STEP_MS * 1.1, f"a step of {STEP_MS} ms", color="gray")
        axis.set(xscale="log", yscale="log", xlabel="devices", ylabel="waiting, ms a step")
        axis.set_xticks(counts, counts)
        axis.minorticks_off()
        axis.legend()
        axis.set_title("statistics over all devices (solid), over groups of 8 (dotted)")
        figure.suptitle(
            f"ResNet-50 waits up to {longest:.0f} ms for {counts[-1]} devices,\n"
            f"at most {max(groups):.1f} ms for groups of 8"
        )
        figure.savefig(path)


def report(repeats):
    yield "# Several devices\n"
    yield f"One batch norm of {FEATURES} features in float32, read from the compiled program:\n"
    yield from traffic_table()
    yield "\nFour convolutions with batch norm, 8 images of 16 x 16 on each device, training:\n"
    yield from time_table(repeats)
    yield (
        "\nProjected: how long a training step of ResNet-50 (53 batch norms) waits for statistics, "
        f"and the share of a step of {STEP_MS} ms:\n"
    )
    yield from projection_table()
    yield (
        f"\n{date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), jax "
        f"{jax.__version__}, normjax {normjax.__version__}; times are the least of {repeats} "
        "interleaved steps on simulated devices that share those cores."
    )


def refresh(page, lines):
    """Writes the table of the projection between its two comments in the page."""
    table = "\n".join(lines)
    text = re.sub(
        r"(<!-- projection.*?-->\n).*?(<!-- end -->)",
        rf"\1{table}\n\2",
        page.read_text(),
        flags=re.DOTALL,
    )
    page.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=31, help="steps of each kind")
    parser.add_argument("--out", type=Path, help="Markdown file to write, with a plot")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    lines = []
    for line in report(args.repeats):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")
        draw(args.out.with_suffix(".png"))
        refresh(PAGE, projection_table())


if __name__ == "__main__":
    main()
