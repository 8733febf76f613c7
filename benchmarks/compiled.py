"""The costs of norms on an H100 and a TPU, read from compiled programs; no device is needed.

python -m benchmarks.compiled                           # all rows, print
python -m benchmarks.compiled --out docs/results  # and write
python -m benchmarks.compiled --platform tpu --only layer_norm,U-Net --peers flax.linen
python -m benchmarks.compiled --platform tpu --topology v6e:2x2

`make compiled` runs it in a separate environment with the two compilers. The figures are
deterministic, so a difference of one percent is a real difference.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import blocks, compiled_picture, compiled_tables, described, hlo, machine
from benchmarks.blocks import BLOCKS, Blocks
from benchmarks.calls import EVALUATION, MODES
from benchmarks.compiled_tables import BLOCK, Cost
from benchmarks.layers import Layer
from benchmarks.peers import BASELINE, Missing, load_module

LAYERS = (
    Layer("ResNet-50 stage 1", "batch_norm", (128, 56, 56, 256)),
    Layer("ResNet-50 stage 2", "batch_norm", (64, 28, 28, 512)),
    Layer("BERT", "layer_norm", (16, 512, 768)),
    Layer("7B", "layer_norm", (8192, 4096)),
    Layer("7B", "rms_norm", (8192, 4096)),
    Layer("diffusion U-Net", "group_norm", (16, 64, 64, 320), 32),
    Layer("style transfer", "instance_norm", (16, 128, 128, 64)),
)
LIBRARIES = (BASELINE, "flax.linen", "flax.nnx", "haiku", "equinox")
# The libraries whose norms fit into `benchmarks.blocks`.
LINEN = {BASELINE: "normjax.linen", "flax.linen": "flax.linen"}


class Case(NamedTuple):
    """One row of the tables: a layer in a dtype and mode, or a training step of blocks."""

    what: Layer | Blocks
    dtype: str
    mode: str

    @property
    def title(self) -> str:
        return f"{self.what.title} {self.dtype} {self.mode}"

    @property
    def bytes(self) -> int:
        """Of x."""
        return prod(self.what.shape) * jnp.dtype(self.dtype).itemsize

    def program(self, library: str) -> Program:
        if isinstance(self.what, Blocks):
            return block_program(self.what, library)
        return layer_program(self.what, self.dtype, self.mode, library)


class Program(NamedTuple):
    """`function(whole, batched)`; the first axes of `batched` may be split over devices."""

    function: Callable[[Any, Any], Any]
    whole: Any
    batched: Any


def layer_program(layer: Layer, dtype: str, mode: str, library: str) -> Program:
    """A layer's evaluation, or its training step: forward and then backward."""
    module = load_module(library)(layer, jnp.dtype(dtype))
    shape = layer.shape
    if module.channels_first:
        shape = (shape[0], shape[-1], *shape[1:-1])
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def evaluation(whole, x):
        return module.apply(*whole, x, False)[0]

    def training_step(whole, batched):
        (params, state), (x, dy) = whole, batched
        forward = partial(jax.vjp, lambda p, x: module.apply(p, state, x, True), has_aux=True)
        y, pullback, state = forward(params, x)
        # In a network dy depends on y, so no part of backward can run before forward ends.
        y, dy = lax.optimization_barrier((y, dy))
        return y, state, pullback(dy)

    whole = module.params, module.state
    if mode == EVALUATION:
        return Program(evaluation, whole, x)
    return Program(training_step, whole, (x, x))


def block_program(row: Blocks, library: str) -> Program:
    """A training step of blocks without an optimizer, with the gradient of their input."""
    if library not in LINEN:
        raise Missing("the blocks are modules of flax.linen")
    module = row.module(import_module(LINEN[library]))
    x = jax.ShapeDtypeStruct(row.shape, blocks.DTYPE)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)

    def loss(params, stats, x):
        y, updates = module.apply({"params": params, **stats}, x, mutable=list(stats))
        return jnp.mean(jnp.square(y.astype(jnp.float32))), updates

    def training_step(whole, x):
        return jax.value_and_grad(loss, (0, 2), has_aux=True)(*whole, x)

    params = variables.pop("params")
    return Program(training_step, (params, variables), x)


def cost(case: Case, library: str, platform: str, devices: Sequence[jax.Device]) -> Cost:
    """The cost of the program on the first device; collectives are counted on all devices."""
    program = case.program(library)
    alone = described.compile_for(devices[:1], *program)
    shared = hlo.parse(described.compile_for(devices, *program).as_text())
    found = hlo.parse(alone.as_text())
    memory = alone.memory_analysis()
    kinds = Counter(i.collective for i in shared.usual_collectives())
    return Cost(
        platform,
        case.what.title,
        case.dtype,
        case.mode,
        library,
        found.cycles() / 1e3 if platform == described.TPU else found.traffic() / case.bytes,
        found.kernels(),
        memory.temp_size_in_bytes / case.bytes,
        found.conditionals(),
        tuple(sorted(kinds.items())),
    )


def cases() -> Iterator[Case]:
    for dtype in machine.DTYPES:
        for layer in LAYERS:
            for mode in reversed(MODES):
                yield Case(layer, dtype, mode)
    for row in BLOCKS:
        yield Case(row, jnp.dtype(blocks.DTYPE).name, BLOCK)


def run(args: argparse.Namespace) -> list[Cost]:
    """The costs in the order of the rows, printed when they are known."""
    found = []
    for platform in args.platform:
        devices = described.devices(platform, args.topology)
        for case in args.cases:
            print(f"\n{platform} {case.title}", flush=True)
            for library in args.peers:
                try:
                    one = cost(case, library, platform, devices)
                except Missing:
                    continue
                except Exception as error:
                    reason = str(error).strip().split("\n")[0]
                    print(f"{library} is left out: {type(error).__name__}: {reason}")
                    continue
                print(compiled_tables.brief(one), flush=True)
                found.append(one)
            # Free the memory of compiled programs; each is compiled only once.
            jax.clear_caches()
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", type=machine.words, default=list(described.PLATFORMS))
    parser.add_argument("--only", type=machine.words, default=[""], help="words of row titles")
    parser.add_argument("--peers", type=machine.words, default=list(LIBRARIES))
    parser.add_argument("--topology", default=described.TOPOLOGY, help="of the TPUs: v6e:2x2, ...")
    parser.add_argument("--out", type=Path, help="folder to write into")
    args = parser.parse_args(argv)
    for option, known in (("platform", described.PLATFORMS), ("peers", LIBRARIES)):
        if unknown := set(getattr(args, option)) - set(known):
            names = ", ".join(sorted(unknown))
            parser.error(f"no such {option}: {names}; there are {', '.join(known)}")
    # The ratios are relative to normjax, so it is always measured.
    args.peers = [name for name in LIBRARIES if name == BASELINE or name in args.peers]
    args.cases = [case for case in cases() if any(word in case.title for word in args.only)]
    if not args.cases:
        titles = "\n  ".join(case.title for case in cases())
        parser.error(f"no row matches; there are\n  {titles}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Cost]:
    args = arguments(argv)
    found = run(args)
    names = {described.GPU: "H100", described.TPU: f"TPU {args.topology.split(':')[0]}"}
    print()
    print("\n".join(compiled_tables.summary(found, names)))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        lines = compiled_tables.report(found, names, args.peers)
        (args.out / "compiled.md").write_text("\n".join(lines) + "\n")
        try:
            compiled_picture.draw(found, names, args.out / "compiled.png")
        except ImportError as error:
            print(f"There is no picture: {error}")
    return found


if __name__ == "__main__":
    main()
