"""A plot of relative times: a panel for each norm, dtype and mode, and a bar for each library."""

from __future__ import annotations

import contextlib
import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.calls import MODES
from benchmarks.tables import Row, names_of

STYLE = Path(__file__).parents[1] / "docs" / "normjax.mplstyle"
# Colors of Okabe and Ito (2008), which color-blind people can tell apart.
FASTER, SLOWER, EVEN = "#0072B2", "#D55E00", "#9A9A9A"
# Ratios between these two are noise, and are drawn as equal.
NOISE = (0.95, 1.05)
# Longer bars are cut off, since they would make the others too short; the label has the value.
LIMITS = (1 / 8, 8)
ALL = "all"


@contextlib.contextmanager
def in_style() -> Iterator[None]:
    """The style of all plots of the site."""
    import matplotlib.style

    with matplotlib.rc_context():
        matplotlib.style.use(STYLE)
        yield


def draw(rows: Sequence[Row], baseline: str, circumstances: str, path: Path) -> None:
    """Draws bars: the geometric mean of the ratios over the layers of a kind."""
    from matplotlib.figure import Figure

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
    with in_style():
        figure = Figure(figsize=size)
        axes = figure.subplots(len(strips), len(kinds), sharex=True, sharey=True, squeeze=False)
        for row, strip in zip(axes, strips, strict=True):
            for axis, kind in zip(row, kinds, strict=True):
                panel(axis, names, ratios[strip, kind])
            row[0].set_ylabel("\n".join(strip), weight="bold")
        for axis, kind in zip(axes[0], kinds, strict=True):
            axis.set_title(kind.replace("_", " "))
        widths(axes, [ratio for panel in ratios.values() for ratio in panel.values()])
        means = [ratio for strip in strips for ratio in ratios[strip, ALL].values()]
        figure.suptitle(
            f"Other libraries take {min(means):.2f} to {max(means):.2f} times as long as {baseline}"
            f"\nblue: {baseline} is faster, vermilion: {baseline} is slower"
        )
        footer = f"Geometric means of the time over that of {baseline}. {circumstances}"
        figure.supxlabel(textwrap.fill(footer, int(14 * size[0])), fontsize=8, color="#666666")
        figure.savefig(path)


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
        ratio, end = ratios[name], length(ratios[name])
        color = EVEN if NOISE[0] <= ratio <= NOISE[1] else FASTER if ratio > 1 else SLOWER
        axis.barh(place, end, color=color, height=0.74)
        right = end >= 0
        axis.annotate(
            f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
            (end, place),
            xytext=(3 if right else -3, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            color="#333333",
        )
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(names)), names, fontsize=10)
    axis.set_ylim(len(names) - 0.4, -0.6)
    without_frame(axis)
    axis.grid(axis="y", visible=False)


def without_frame(axis) -> None:
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def widths(axes, ratios: Sequence[float]) -> None:
    """The limits of all panels, with space for the longest bar and its label."""
    lengths = [0.0, *map(length, ratios)]
    span = max(1.0, max(lengths) - min(lengths))
    margin = 0.28 * span
    for axis in axes.flat:
        axis.set_xlim(min(lengths) - margin, max(lengths) + margin)
        ticks = [t for t in range(-3, 4) if min(lengths) - margin < t < max(lengths) + margin]
        axis.set_xticks(ticks, [f"{2**t}" if t >= 0 else f"1/{2**-t}" for t in ticks], fontsize=9)
