"""Draws the plot of the README: training steps of models, relative to those with Flax's norms.

python -m benchmarks.summary    # from docs/results, to docs/cost.png
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.picture import in_style

ROOT = Path(__file__).parents[1]


class Share(NamedTuple):
    """The cost of a training step with norms of normjax, relative to that with Flax's norms."""

    model: str
    dtype: str
    time: float
    memory: float


def shares(table: Path) -> Iterator[Share]:
    """The rows of normjax in a table of `benchmarks.models`."""
    for line in table.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) > 6 and cells[2].startswith("normjax"):
            name = cells[0].split(",")[0] if "images" in cells[0] else cells[0]
            model = name + (" (NNX)" if cells[2] == "normjax.nnx" else "")
            yield Share(model, cells[1], float(cells[4]), float(cells[6]))


def title(found: list[Share]) -> str:
    """The title of the plot."""

    def range_of(values: list[float]) -> str:
        return f"{min(values):.2f} to {max(values):.2f} times"

    time, memory = ([getattr(share, kind) for share in found] for kind in ("time", "memory"))
    return f"Training steps: {range_of(time)} the time and {range_of(memory)} the memory"


def draw(found: list[Share]) -> Figure:
    """Draws a bar for the time and one for the memory of each model; 1 is Flax."""
    models = list(dict.fromkeys(share.model for share in found))
    with in_style():
        figure = Figure(figsize=(10, 0.75 * len(models) + 1.2))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
            rows = {share.model: share for share in found if share.dtype == dtype}
            places = range(len(rows))
            for offset, kind, ink in ((-0.2, "time", "white"), (0.2, "memory", "black")):
                values = [getattr(share, kind) for share in rows.values()]
                bars = axes.barh([p + offset for p in places], values, 0.38, label=kind)
                axes.bar_label(bars, fmt="%.2f", label_type="center", color=ink)
            axes.axvline(1, color="black", linewidth=1)
            axes.set_yticks(places, list(rows))
            axes.set_title(dtype)
            axes.set(xlim=(0, 1.2), xlabel="share of the step with Flax's norms")
            axes.grid(axis="y", visible=False)
        panels[0].invert_yaxis()
        panels[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
        figure.suptitle(title(found))
    return figure


def main() -> None:
    results = ROOT / "docs" / "results"
    found = [s for name in ("models", "nnx_models") for s in shares(results / f"{name}.md")]
    draw(found).savefig(ROOT / "docs" / "cost.png")


if __name__ == "__main__":
    main()
