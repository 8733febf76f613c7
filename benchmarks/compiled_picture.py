"""A plot of the cost of flax.linen relative to normjax: a dot for each row and platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compiled_tables import BLOCK, METRICS, MODES, PEER, Cost, Ratio, ratios
from benchmarks.peers import BASELINE
from benchmarks.picture import EVEN, FASTER, SLOWER

GAP = 1.0  # between modes, in rows
# A smaller difference is not noticeable, and is drawn as equal.
NOTICED = 0.005


def draw(costs: Sequence[Cost], names: Mapping[str, str], path: Path) -> None:
    """One panel for each platform; one line for each layer and mode, with a dot for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {p: ratios(costs, p) for p in dict.fromkeys(cost.platform for cost in costs)}
    places = lines_of([ratio for panel in found.values() for ratio in panel])
    if not places:
        return
    lowest = max(places.values())
    size = 3.8 + 4.0 * len(found), 1.7 + 0.3 * (lowest + 1)
    figure, axes = plt.subplots(1, len(found), figsize=size, sharey=True, squeeze=False)
    values = [ratio.value for panel in found.values() for ratio in panel]
    for axis, (platform, panel) in zip(axes[0], found.items(), strict=True):
        axis.set_title(f"{names[platform]}: {METRICS[platform]}", fontsize=11)
        dots(axis, panel, places)
        frame(axis, values)
    first = axes[0][0]
    first.set_yticks(
        list(places.values()), [row.replace("_", " ") for row, _ in places], fontsize=9
    )
    first.set_ylim(lowest + 0.6, -1.1)
    for mode in MODES:
        if of_mode := [place for (_, m), place in places.items() if m == mode]:
            first.annotate(
                mode,
                (0, min(of_mode) - 0.75),
                xycoords=("axes fraction", "data"),
                xytext=(-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
                weight="bold",
            )
    height = size[1]
    figure.subplots_adjust(
        left=3.6 / size[0], right=0.985, bottom=0.55 / height, top=1 - 0.95 / height, wspace=0.06
    )
    title: dict[str, Any] = dict(ha="center", y=1 - 0.3 / height, weight="bold")
    figure.text(x=0.5, s=f"Cost of {PEER} over that of {BASELINE}", fontsize=13, **title)
    place: dict[str, Any] = dict(y=1 - 0.55 / height, fontsize=10, weight="bold")
    figure.text(x=0.49, s=f"green: {BASELINE} costs less", ha="right", color=FASTER, **place)
    figure.text(x=0.51, s=f"red: {BASELINE} costs more", ha="left", color=SLOWER, **place)
    figure.text(
        0.5,
        0.1 / height,
        f"filled: float32, hollow: bfloat16, gray: within {NOTICED:.1%}",
        ha="center",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines_of(found: Sequence[Ratio]) -> dict[tuple[str, str], float]:
    """The y position of each layer and mode, with a gap before each mode."""
    places: dict[tuple[str, str], float] = {}
    height = 0.0
    for mode in MODES:
        rows = dict.fromkeys(ratio.row for ratio in found if ratio.mode == mode)
        for row in rows:
            places[row, mode] = height
            height += 1
        height += GAP if rows else 0
    return places


def dots(axis, panel: Sequence[Ratio], places: Mapping[tuple[str, str], float]) -> None:
    for ratio in panel:
        color = FASTER if ratio.value > 1 else SLOWER
        color = EVEN if abs(ratio.value - 1) < NOTICED else color
        both = ratio.mode != BLOCK
        height = places[ratio.row, ratio.mode]
        # The two dtypes often have equal costs, and one dot must not hide the other.
        height += (-0.16 if ratio.dtype == "float32" else 0.16) * both
        filled = color if ratio.dtype == "float32" else "white"
        axis.plot([1, ratio.value], [height, height], color=color, linewidth=1.3, alpha=0.5)
        axis.plot(ratio.value, height, "o", markersize=5.5, color=color, markerfacecolor=filled)


def frame(axis, values: Sequence[float]) -> None:
    low, high = min([*values, 0.9]), max([*values, 1.1])
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(low / 1.06, high * 1.06)
    ticks = [
        t
        for t in (0.25, 0.33, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4)
        if low / 1.06 < t < high * 1.06
    ]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=9)
    axis.set_xticks([], minor=True)
    axis.tick_params(length=0)
    axis.grid(color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)
