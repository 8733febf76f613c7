"""What the evidence scripts share: their options, and the page and the picture that each writes.

A script states a claim, measures it over several seeds, and concludes whether it held. Page,
number and picture come from the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import flax
import jax
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

import normjax

ROOT = Path(__file__).parents[2]
STYLE = ROOT / "docs" / "normjax.mplstyle"
Found = TypeVar("Found")


class Claim(NamedTuple):
    """What a textbook says.

    Attributes:
        title: of the page, a few words.
        text: one sentence.
        source: author, year, and where to read it.
    """

    title: str
    text: str
    source: str


class Options(NamedTuple):
    """How much is run.

    Attributes:
        seeds: how many repetitions, with seeds 0, 1, 2, ...
        smoke: a few steps of everything, to see that it runs; no claim on the outcome.
    """

    seeds: int
    smoke: bool


class Conclusion(NamedTuple):
    """What was found.

    Attributes:
        held: whether the claim held in this experiment.
        number: the figure to remember, with its unit, such as "16 times".
        text: two or three sentences: what was trained, what came out, and where the claim failed.
        header, rows: a table of what was measured.
    """

    held: Literal["yes", "partly", "no"]
    number: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def spread(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation over seeds; infinite if one is."""
    if not np.isfinite(values).all():
        return "∞"
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def main(
    claim: Claim,
    measure: Callable[[Options], Found],
    conclude: Callable[[Found], Conclusion],
    draw: Callable[[Figure, Found], None],
    seeds: int = 3,
) -> Conclusion:
    """Measures, concludes, and writes NAME.md, NAME.png and NAME.json, NAME that of the script.

    Args:
        claim: what is examined.
        measure: runs the experiment.
        conclude: reads the numbers.
        draw: fills a figure; its title states the finding.
        seeds: the default of `--seeds`.
    """
    script = Path(sys.modules[measure.__module__].__file__ or "")
    parser = argparse.ArgumentParser(description=f"{claim.text} {claim.source}")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"repetitions (default {seeds})")
    parser.add_argument("--smoke", action="store_true", help="little of all, and no claim")
    parser.add_argument("--out", type=Path, help="folder to write into (default docs/evidence)")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    # A short run must not overwrite the pages that are published.
    out = args.out or (Path(tempfile.mkdtemp()) if args.smoke else ROOT / "docs" / "evidence")
    out.mkdir(parents=True, exist_ok=True)
    options = Options(1 if args.smoke else args.seeds, args.smoke)

    started = time.perf_counter()
    found = measure(options)
    seconds = time.perf_counter() - started
    conclusion = conclude(found)

    with matplotlib.rc_context():
        matplotlib.style.use(STYLE)
        figure = Figure(figsize=(9, 4.5))
        draw(figure, found)
        figure.savefig(out / f"{script.stem}.png", metadata={"Software": None})
    plural = "s" if options.seeds > 1 else ""
    circumstances = (
        f"{options.seeds} seed{plural}, {seconds:.0f} s on {processor()}. {date.today()}, "
        f"normjax {normjax.__version__}, jax {jax.__version__}, flax {flax.__version__}, "
        f"Python {platform.python_version()}."
    )
    (out / f"{script.stem}.md").write_text(page(script, claim, conclusion, circumstances))
    record = {
        "name": script.stem,
        "title": claim.title,
        "claim": claim.text,
        "source": claim.source,
        "held": conclusion.held,
        "number": conclusion.number,
        "finding": conclusion.text,
        "circumstances": circumstances,
    }
    (out / f"{script.stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    if not args.smoke:
        print(f"{claim.text}\nHeld here: {conclusion.held}, {conclusion.number}. {conclusion.text}")
    print(f"{out / script.stem}.md, .png, .json: {seconds:.0f} s")
    return conclusion


def processor() -> str:
    return f"{jax.devices()[0].platform.upper()} ({platform.machine()})"


def page(script: Path, claim: Claim, conclusion: Conclusion, circumstances: str) -> str:
    held = f"**Did it hold here? {conclusion.held.title()}: {conclusion.number}.**"
    table = [
        f"| {' | '.join(conclusion.header)} |",
        f"|{'---|' * len(conclusion.header)}",
        *(f"| {' | '.join(row)} |" for row in conclusion.rows),
    ]
    return "\n".join(
        [
            f"# {claim.title}",
            "",
            f"> {claim.text}",
            ">",
            f"> {claim.source}",
            "",
            f"{held} {conclusion.text}",
            "",
            f"![{claim.title}: {conclusion.number}]({script.stem}.png)",
            "",
            *table,
            "",
            f"{circumstances} Run it: `python examples/evidence/{script.name}`.",
            "",
        ]
    )
