"""Training steps of Flax models that differ only in their norms: time, memory, compile time."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, tables
from benchmarks.calls import Call, compile_, interleave


class Step(NamedTuple):
    """One variant of a model: times in seconds, and loss and gradients of its first step."""

    model: str
    dtype: str
    variant: str
    times: Sequence[float]
    compile_seconds: float
    temporary_bytes: int
    loss: float
    gradients: Any


def compare(
    model: str,
    variants: Mapping[str, Callable[[str], nn.Module]],
    x: np.ndarray,
    dtype: str,
    repeats: int,
    seconds: float,
) -> list[Step]:
    """Interleaved steps of all variants, from the same variables on the same `x`.

    A variant is a function from the name of a dtype to a module; the module is called with `x`.
    """
    x = jnp.asarray(x, dtype)
    modules = {name: make(dtype) for name, make in variants.items()}
    given = *start(next(iter(modules.values())), x), x
    calls, found = {}, {}
    for name, module in modules.items():
        compiled, compile_seconds = compile_(training_step(module), *given)
        loss, gradients, _ = compiled(*given)
        found[name] = compiled.memory_analysis().temp_size_in_bytes, float(loss), gradients
        calls[name] = Call(
            lambda compiled=compiled: jax.block_until_ready(compiled(*given)),
            compile_seconds=compile_seconds,
        )
    times = interleave(calls, repeats, seconds)
    return [
        Step(model, dtype, name, times[name], calls[name].compile_seconds, *found[name])
        for name in variants
    ]


def start(module: nn.Module, x: jax.Array) -> tuple[dict, dict, jax.Array]:
    """Parameters, statistics and a target, from NumPy: to compile `init` takes minutes."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            deviation = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(rng.normal(0, deviation, leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, 1.0 if name in ("scale", "var") else 0.0, leaf.dtype)

    y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    variables = jax.tree_util.tree_map_with_path(fill, variables)
    target = jnp.asarray(rng.normal(0, 1, y.shape), jnp.float32)
    return variables["params"], variables.get("batch_stats", {}), target


def training_step(module: nn.Module) -> Callable:
    """Loss, gradients and new statistics; no optimizer, as its cost does not depend on norms."""

    def step(params, stats, target, x):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = module.apply(variables, x, mutable=["batch_stats"])
            return jnp.mean(jnp.square(y.astype(jnp.float32) - target)), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, gradients, updates

    return step


def difference(gradients: Any, expected: Any) -> float:
    """The difference of two trees of gradients, relative to the second."""
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True)
    squares = [(np.sum(np.square(a - b)), np.sum(np.square(b))) for a, b in pairs]
    apart, size = np.sum(squares, axis=0)
    return float(np.sqrt(apart / size))


def table(steps: Sequence[Step]) -> Iterator[str]:
    """Figures are shares of the first variant of the same model and dtype."""
    names = ["model", "dtype", "norms", "ms", "time", "temporary MB", "memory"]
    yield from tables.header([*names, "compile s", "compile", "loss", "gradients differ by"])
    base = None
    for step in steps:
        if base is None or (base.model, base.dtype) != (step.model, step.dtype):
            base = step
        time, base_time = statistics.median(step.times), statistics.median(base.times)
        cells = [step.model, step.dtype, step.variant]
        cells += [f"{1e3 * time:.1f} ±{tables.spread(step.times):.0%}", f"{time / base_time:.2f}"]
        cells += [tables.megabytes(step.temporary_bytes)]
        cells += [f"{step.temporary_bytes / base.temporary_bytes:.2f}"]
        cells += [f"{step.compile_seconds:.2f}"]
        cells += [f"{step.compile_seconds / base.compile_seconds:.2f}", f"{step.loss:.6f}"]
        cells += [f"{difference(step.gradients, base.gradients):.1e}"]
        yield tables.line(cells)


def report(
    title: str, steps: Sequence[Step], repeats: int, peer: str = "flax.linen"
) -> Iterator[str]:
    yield f"# {title}"
    yield ""
    yield machine.circumstances(["normjax", peer], repeats)
    yield ""
    yield "Under time, memory and compile: as a share of the first line of the model."
    yield ""
    yield from table(steps)


def arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", type=machine.words, default=[""], help="words of model names")
    parser.add_argument("--dtype", type=machine.words, default=list(machine.DTYPES))
    parser.add_argument("--repeats", type=int, default=15, help="rounds at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="of rounds at least")
    parser.add_argument("--out", type=Path, help="folder to write into")
    return parser.parse_args(argv)


def write(lines: Sequence[str], out: Path | None, name: str) -> None:
    print("\n".join(lines))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("\n".join(lines) + "\n")
