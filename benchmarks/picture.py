"""A plot of relative times: a panel for each norm, dtype and mode, and a bar for each library."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.calls import MODES
from benchmarks.tables import Row, names_of

FASTER, SLOWER, EVEN = "#2a7f62", "#c8553d", "#9a9a9a"
# Ratios between these two are noise, and are drawn as equal.
NOISE = (0.95, 1.05)
# Longer bars are cut off, since they would make the others too short; the label has the value.
LIMITS = (1 / 8, 8)
ALL = "all"


def draw(rows: Sequence[Row], baseline: str, circumstances: str, path: Path) -> None:
    """Draws bars: the geometric mean of the ratios over the layers of a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in names_of(rows) if name != baseline]
    kinds = [ALL, *dict.fromkeys(kind_of(row) for row in rows)]
    strips = sorted(
        {(row.mode, row.dtype) for row in rows},
        key=lambda strip: (MODES.index(strip[0]), strip[1] != "float32"),
    )
    ratios = {
        (strip, kind): ratios_of(rows, baseline, kind, *strip) for strip in strips for kind in kinds
    }
    size = 2.0 + 2.1 * len(kinds), 1.9 + (0.4 + 0.22 * max(len(names), 5)) * len(strips)
    figure, axes = plt.subplots(
        len(strips), len(kinds), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for row, strip in zip(axes, strips, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            panel(axis, names, ratios[strip, kind])
        row[0].set_ylabel("\n".join(strip), fontsize=11, weight="bold", labelpad=10)
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.set_title(kind.replace("_", " "), fontsize=12, weight="bold")
    widths(axes, [ratio for panel in ratios.values() for ratio in panel.values()])
    height = size[1]
    figure.subplots_adjust(
        left=1.9 / size[0], right=0.99, bottom=0.7 / height, top=1 - 1.0 / height, hspace=0.12
    )
    heading(figure, baseline, height)
    footer = textwrap.fill(circumstances, int(15 * size[0]))
    figure.text(0.5, 0.1 / height, footer, ha="center", fontsize=7, color="#666666")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def heading(figure, baseline: str, height: float) -> None:
    figure.text(
        0.5,
        1 - 0.3 / height,
        f"Time of each library over that of {baseline}",
        ha="center",
        fontsize=14,
        weight="bold",
    )
    green, red = f"green: {baseline} is faster", f"red: {baseline} is slower"
    place = dict(y=1 - 0.55 / height, fontsize=11, weight="bold")
    figure.text(x=0.49, s=green, ha="right", color=FASTER, **place)
    figure.text(x=0.51, s=red, ha="left", color=SLOWER, **place)


def kind_of(row: Row) -> str:
    return row.layer.split()[0]


def ratios_of(
    rows: Sequence[Row], baseline: str, kind: str, mode: str, dtype: str
) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if kind in (ALL, kind_of(row)) and (row.mode, row.dtype) == (mode, dtype):
            for name, ratio in row.ratios(baseline).items():
                found.setdefault(name, []).append(ratio)
    return {name: statistics.geometric_mean(ratios) for name, ratios in found.items()}


def length(ratio: float) -> float:
    """The length of a bar: half the time and twice the time have equal lengths."""
    return math.log2(min(max(ratio, LIMITS[0]), LIMITS[1]))


def panel(axis, names: Sequence[str], ratios: dict[str, float]) -> None:
    for place, name in enumerate(names):
        if name not in ratios:
            continue
        ratio, wide = ratios[name], length(ratios[name])
        color = EVEN if NOISE[0] <= ratio <= NOISE[1] else FASTER if ratio > 1 else SLOWER
        axis.barh(place, wide, color=color, height=0.74)
        right = wide >= 0
        axis.annotate(
            f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
            (wide, place),
            xytext=(3 if right else -3, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            color="#333333",
        )
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(names)), names, fontsize=9.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(length=0)
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)


def widths(axes, ratios: Sequence[float]) -> None:
    """The limits of all panels, with space for the longest bar and its label."""
    lengths = [0.0, *map(length, ratios)]
    span = max(1.0, max(lengths) - min(lengths))
    room = 0.28 * span
    for axis in axes.flat:
        axis.set_xlim(min(lengths) - room, max(lengths) + room)
        ticks = [t for t in range(-3, 4) if min(lengths) - room < t < max(lengths) + room]
        axis.set_xticks(ticks, [f"{2**t}" if t >= 0 else f"1/{2**-t}" for t in ticks], fontsize=9)
