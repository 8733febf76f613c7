"""Costs of compiled programs as Markdown: a summary of their ratios, and all figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import jax

from benchmarks.calls import EVALUATION, TRAINING
from benchmarks.described import DEVICES, GPU, TPU
from benchmarks.peers import BASELINE, described
from benchmarks.tables import header, line

PEER = "flax.linen"
BLOCK = "training step of blocks"
MODES = (EVALUATION, TRAINING, BLOCK)
METRICS = {GPU: "memory traffic", TPU: "cycles"}
UNITS = {GPU: "in units of x", TPU: "in thousands"}
COMPILERS = {GPU: ("jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"), TPU: ("libtpu",)}

EXPLANATION = f"""\
No such device was used. XLA compiled for descriptions of the devices, and these figures are read
from the compiled programs. They are evidence, not times.

- **GPU**: bytes that kernels read and write, in units of the bytes of x. Norms are limited by
  memory bandwidth. Reads from a cache count too.
- **TPU**: cycles estimated by the cost model of XLA. Copies into the memory on the chip overlap
  with the kernels and have no cycles in it.
- **kernels**: the number of kernels, launched in sequence. **temporary**: memory except inputs and
  outputs, in units of x. **conditionals**: only the cheapest branch of each counts.
- **collectives**: those of the same program, jitted over {DEVICES} devices that share the batch; x2
  is two all-reduces. They include those for the gradients of parameters, but not those in branches
  that are seldom taken.
- A training step is forward, then backward. Blocks are two residual blocks with their loss, in
  bfloat16 with parameters in float32; they are modules of flax.linen.
- A dash: the library has no such layer.""".splitlines()


class Cost(NamedTuple):
    """The cost of a library's program on a described platform.

    `value` is the traffic in units of x for a GPU, and thousands of cycles for a TPU. `temporary`
    is memory in units of x. `collectives` maps kinds to numbers, on four devices.
    """

    platform: str
    row: str
    dtype: str
    mode: str
    library: str
    value: float
    kernels: int
    temporary: float
    conditionals: int
    collectives: tuple[tuple[str, int], ...]

    @property
    def case(self) -> tuple[str, str, str]:
        return self.row, self.dtype, self.mode

    @property
    def exchanges(self) -> str:
        """A short form of the collectives; those without a name are all-reduces."""
        cells = [
            f"x{number}" if kind == "all-reduce" else f"{kind} x{number}"
            for kind, number in self.collectives
        ]
        return ", ".join(cells) or "none"


class Ratio(NamedTuple):
    """The cost of another library divided by that of normjax. Above 1, normjax costs less."""

    row: str
    dtype: str
    mode: str
    value: float


def ratios(costs: Sequence[Cost], platform: str, peer: str = PEER) -> list[Ratio]:
    """The ratios for the rows that both libraries have."""
    values = {(c.case, c.library): c.value for c in costs if c.platform == platform}
    return [
        Ratio(*case, values[case, peer] / value)
        for (case, library), value in values.items()
        if library == BASELINE and (case, peer) in values
    ]


def summary(costs: Sequence[Cost], names: Mapping[str, str]) -> Iterator[str]:
    """Geometric mean and minimum of the ratios to flax.linen, for each mode and platform."""
    platforms = list(dict.fromkeys(cost.platform for cost in costs))
    columns = [f"{names[p]}: {what}" for p in platforms for what in ("mean", "least")]
    yield from header([f"{PEER} over {BASELINE}", *columns])
    for mode in MODES:
        cells = []
        for platform in platforms:
            found = [ratio.value for ratio in ratios(costs, platform) if ratio.mode == mode]
            mean = f"{statistics.geometric_mean(found):.2f}" if found else "-"
            cells += [mean, f"{min(found):.2f}" if found else "-"]
        if any(cell != "-" for cell in cells):
            yield line([mode, *cells])


def brief(cost: Cost) -> str:
    unit = "k cycles" if cost.platform == TPU else "x moved "
    return (
        f"  {cost.library:12} {cost.value:9.2f} {unit}  {cost.kernels:4} kernels"
        f"  {cost.temporary:6.2f} x temporary  {cost.conditionals:2} conditionals"
        f"  collectives: {cost.exchanges}"
    )


def values_table(costs: Sequence[Cost], platform: str, libraries: Sequence[str]) -> Iterator[str]:
    """One line for each row: the cost of each library, and the ratio that the summary uses."""
    own = [cost for cost in costs if cost.platform == platform]
    values = {(cost.case, cost.library): cost.value for cost in own}
    found = {ratio[:3]: ratio.value for ratio in ratios(costs, platform)}
    digits = 0 if platform == TPU else 2
    names = [BASELINE, *(name for name in libraries if name != BASELINE)]
    yield from header(["layer", "dtype", "mode", *names, f"{PEER} / {BASELINE}"])
    for case in dict.fromkeys(cost.case for cost in own):
        cells = [
            f"{values[case, name]:.{digits}f}" if (case, name) in values else "-" for name in names
        ]
        yield line([*case, *cells, f"{found[case]:.2f}" if case in found else "-"])
    for mode in MODES:
        cells = [mean_of(ratios(costs, platform, name), mode) for name in names[1:]]
        if any(cell != "-" for cell in cells):
            title = f"**over {BASELINE}, geometric mean**"
            yield line([title, "", mode, "1", *cells, ""])


def mean_of(found: Sequence[Ratio], mode: str) -> str:
    values = [ratio.value for ratio in found if ratio.mode == mode]
    return f"{statistics.geometric_mean(values):.2f}" if values else "-"


def details_table(costs: Sequence[Cost], platform: str) -> Iterator[str]:
    """One line for each library: all figures."""
    names = ["layer", "dtype", "mode", "library", METRICS[platform], "kernels", "temporary, x"]
    yield from header([*names, "conditionals", "collectives"])
    for cost in costs:
        if cost.platform == platform:
            cells = [*cost.case, cost.library, f"{cost.value:.2f}", str(cost.kernels)]
            cells += [f"{cost.temporary:.2f}", str(cost.conditionals), cost.exchanges]
            yield line(cells)


def circumstances(platforms: Sequence[str], libraries: Sequence[str]) -> str:
    versions = [f"jax {jax.__version__}"]
    for name in (name for platform in platforms for name in COMPILERS[platform]):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} of another source")
    return f"{date.today()}, {', '.join([*versions, *map(described, libraries)])}."


def report(
    costs: Sequence[Cost], names: Mapping[str, str], libraries: Sequence[str]
) -> Iterator[str]:
    platforms = list(dict.fromkeys(cost.platform for cost in costs))
    yield f"# Compiled for {' and '.join(names[p] for p in platforms)}"
    yield ""
    yield circumstances(platforms, libraries)
    yield ""
    yield from EXPLANATION
    yield ""
    yield from summary(costs, names)
    yield ""
    yield f"Above 1, {BASELINE} costs less."
    yield ""
    yield f"![Cost of {PEER} over that of {BASELINE}](compiled.png)"
    for platform in platforms:
        yield ""
        yield f"## {names[platform]}: {METRICS[platform]}, {UNITS[platform]}"
        yield ""
        yield from values_table(costs, platform, libraries)
    for platform in platforms:
        yield ""
        yield f"## {names[platform]}: all figures"
        yield ""
        yield from details_table(costs, platform)
