"""A plot of the cost of flax.linen relative to normjax: a dot for each row and platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.compiled_tables import BLOCK, METRICS, MODES, PEER, Cost, Ratio, ratios
from benchmarks.peers import BASELINE
from benchmarks.picture import EVEN, FASTER, SLOWER, in_style, without_frame

GAP = 1.0  # between modes, in rows
# A smaller difference is not noticeable, and is drawn as equal.
NOTICED = 0.005


def draw(costs: Sequence[Cost], names: Mapping[str, str], path: Path) -> None:
    """One panel for each platform; one line for each layer and mode, with a dot for each dtype."""
    from matplotlib.figure import Figure

    found = {p: ratios(costs, p) for p in dict.fromkeys(cost.platform for cost in costs)}
    values = [ratio.value for panel in found.values() for ratio in panel]
    if not values:
        return
    places = lines_of([ratio for panel in found.values() for ratio in panel])
    lowest = max(places.values())
    with in_style():
        figure = Figure(figsize=(3.8 + 4.0 * len(found), 1.9 + 0.3 * (lowest + 1)))
        axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axis, (platform, panel) in zip(axes, found.items(), strict=True):
            axis.set_title(f"{names[platform]}: {METRICS[platform]}")
            dots(axis, panel, places)
            frame(axis, values)
        label(axes[0], places)
        figure.suptitle(
            f"{PEER} costs {min(values):.2f} to {max(values):.2f} times as much as {BASELINE}\n"
            f"blue: {BASELINE} costs less, vermilion: {BASELINE} costs more"
        )
        figure.supxlabel(
            f"filled: float32, hollow: bfloat16, gray: within {NOTICED:.1%}", fontsize=10
        )
        figure.savefig(path)


def label(axis, places: Mapping[tuple[str, str], float]) -> None:
    """The name of each line, and that of the mode above its lines."""
    axis.set_yticks(list(places.values()), [row.replace("_", " ") for row, _ in places])
    axis.set_ylim(max(places.values()) + 0.6, -1.1)
    for mode in MODES:
        if of_mode := [place for (_, m), place in places.items() if m == mode]:
            axis.annotate(
                mode,
                (0, min(of_mode) - 0.75),
                xycoords=("axes fraction", "data"),
                xytext=(-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                weight="bold",
            )


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
    without_frame(axis)
