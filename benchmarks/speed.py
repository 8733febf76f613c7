"""The time and memory of one layer in every library, as Markdown and a plot.

python -m benchmarks.speed                                   # all layers, print
python -m benchmarks.speed --out docs/results          # and write
python -m benchmarks.speed --only batch_norm --dtype float32 --peers flax.linen,torch
"""

from __future__ import annotations

import argparse
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax.numpy as jnp
import numpy as np

from benchmarks import machine, picture, tables
from benchmarks.calls import MODES, Call, copy_call, interleave
from benchmarks.layers import LAYERS, Layer
from benchmarks.peers import BASELINE, PEERS, Missing, load
from benchmarks.tables import Measurement

# How much y and dx of two libraries may differ on data of deviation 1. If they differ by more, they
# do not compute the same function, and their times must not be compared. The limit allows for
# libraries that compute statistics in bfloat16.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}


def installed(names: Sequence[str]) -> dict:
    """The adapters of installed libraries; it prints a line for each of the others."""
    found = {}
    for name in names:
        try:
            found[name] = load(name)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    return found


def build(peers: dict, layer: Layer, dtype: str, modes: Sequence[str]) -> dict:
    """The calls of all libraries by (library, mode), checked to compute the same function."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(0.5, 1, layer.shape), dtype) for _ in range(2))
    found: dict[tuple[str, str], Call] = {}
    expected: dict[str, list[np.ndarray]] = {}
    for name, calls in peers.items():
        try:
            for mode, call in calls(layer, x, dy).items():
                if mode not in modes:
                    continue
                values = call.values()
                off = difference(values, expected.setdefault(mode, values))
                if off > TOLERANCE[dtype]:
                    print(f"{name} is left out of {layer.title} {mode}: off by {off:.2g}")
                    continue
                found[name, mode] = call
        except Missing:
            continue
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            print(f"{name} is left out of {layer.title}: {type(error).__name__}: {reason}")
    return found


def difference(values: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    return max(float(np.max(np.abs(a - b))) for a, b in zip(values, expected, strict=True))


def measure(
    peers: dict, layer: Layer, dtype: str, modes: Sequence[str], repeats: int, seconds: float
) -> Iterator[Measurement]:
    calls: dict = build(peers, layer, dtype, modes)
    nbytes = layer.bytes(dtype)
    times = interleave({**calls, "copy": copy_call(nbytes)}, repeats, seconds)
    copy = float(np.median(times.pop("copy")))
    for (name, mode), call in calls.items():
        yield Measurement(
            layer.title,
            dtype,
            mode,
            name,
            tuple(times[name, mode]),
            copy,
            nbytes,
            layer.tensors_moved(mode),
            call.compile_seconds,
            call.kept_bytes,
            call.temporary_bytes,
        )


def run(args: argparse.Namespace) -> list[Measurement]:
    """Measures layers and dtypes in random order, and prints the results of each."""
    names = [name for name in PEERS if name == BASELINE or name in args.peers]
    peers = installed(names)
    chosen = [la for la in LAYERS if any(word in la.title for word in args.only)]
    blocks = [(layer, dtype) for layer in chosen for dtype in args.dtype]
    order = random.sample(blocks, len(blocks))
    found: dict[tuple, list[Measurement]] = {}
    for layer, dtype in order:
        block = measure(peers, layer, dtype, args.mode, args.repeats, args.seconds)
        found[layer, dtype] = list(block)
        for row in tables.rows_of(found[layer, dtype]):
            print(f"\n{row.layer} {row.dtype} {row.mode}")
            for line in brief(row):
                print(line, flush=True)
    return [m for block in blocks for m in found[block]]


def brief(row: tables.Row) -> Iterator[str]:
    ratios = row.ratios(BASELINE)
    for name, m in row.contenders.items():
        ratio = f"{ratios[name]:5.2f}" if name in ratios else "     "
        yield (
            f"  {name:20} {1e3 * m.median:8.2f} ms ±{m.spread:4.0%} {ratio}"
            f"  {m.over_floor:5.2f} floors  {m.bandwidth / 1e9:5.1f} GB/s"
            f"  kept {tables.megabytes(m.kept_bytes):>6} MB"
            f"  temporary {tables.megabytes(m.temporary_bytes):>6} MB"
            f"  compile {tables.number(m.compile_seconds, digits=2)} s"
        )


def report(measurements: Sequence[Measurement], repeats: int) -> Iterator[str]:
    rows = tables.rows_of(measurements)
    yield "# One layer"
    yield ""
    yield machine.circumstances(tables.names_of(rows), repeats)
    yield ""
    yield f"Under the names of libraries: their time over that of {BASELINE}; above 1,"
    yield f"{BASELINE} is faster. The floor is the time of a copy of the bytes that a layer has to"
    yield "move (benchmarks/layers.py lists them). Every library reuses memory that is already"
    yield "allocated, as a layer in a network does, so times include no page faults."
    yield ""
    yield f"![Time of each library over that of {BASELINE}](speed.png)"
    yield ""
    yield from tables.ratios_table(rows, BASELINE)
    yield ""
    yield "## Everything that was measured"
    yield ""
    yield from tables.details_table(rows, BASELINE)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=machine.words, default=[""], help="words of layer titles")
    parser.add_argument("--dtype", type=machine.words, default=list(machine.DTYPES))
    parser.add_argument("--mode", type=machine.words, default=["training", "evaluation"])
    parser.add_argument("--peers", type=machine.words, default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--repeats", type=int, default=15, help="rounds at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="of rounds at least")
    parser.add_argument("--out", type=Path, help="folder to write into")
    args = parser.parse_args(argv)
    args.mode = [m for m in MODES if any(m.startswith(word) for word in args.mode)]
    unknown = set(args.peers) - set(PEERS)
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if not any(word in la.title for word in args.only for la in LAYERS):
        titles = "\n  ".join(la.title for la in LAYERS)
        parser.error(f"no layer matches; there are\n  {titles}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Measurement]:
    args = arguments(argv)
    machine.prepare()
    machine.keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch")
    measurements = run(args)
    rows = tables.rows_of(measurements)
    print()
    for line in tables.means_in_words(rows, BASELINE):
        print(line)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "speed.md").write_text("\n".join(report(measurements, args.repeats)) + "\n")
        title = machine.circumstances(tables.names_of(rows), args.repeats)
        try:
            picture.draw(rows, BASELINE, title, args.out / "speed.png")
        except ImportError as error:
            print(f"There is no picture: {error}")
    return measurements


if __name__ == "__main__":
    main()
