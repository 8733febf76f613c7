"""The report of `diagnose`: data, a table, a figure and an assertion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

import numpy as np

# The mean of 16 independent values is off by a quarter of a deviation, which is about where Wu,
# He (2018, arXiv:1803.08494) see batch norm fall behind.
FEW_SAMPLES = 16
# Nats, the mean over channels: variances that differ by the factor 1.8, or means by 0.45
# deviations. Running averages of a healthy training stay below a tenth of it.
STALE = 0.1
STALE_SHIFT, STALE_RATIO = 0.45, (0.49, 1.8)

# Which findings a panel of the figure shows, and the colorblind-safe colors of Okabe and Ito
# (2008).
OF_STATISTICS = {"stale", "never updated", "devices differ", "not finite"}
OF_SAMPLES = {"few samples"}
OK, NOTED, SERIOUS = "#0072B2", "#E69F00", "#D55E00"


class Finding(NamedTuple):
    """A problem of a batch norm.

    Attributes:
        path: of the layer.
        kind: a word or two.
        serious: whether outputs in evaluation are wrong, or may be.
        what: the finding in words, with its number.
        remedy: what to do.
    """

    path: str
    kind: str
    serious: bool
    what: str
    remedy: str


@dataclass(frozen=True)
class NormReport:
    """One batch norm. Arrays have one value for each channel, in float64.

    Attributes:
        path: of the layer.
        epsilon: what the layer adds to a variance.
        running_mean, running_var: its running statistics.
        actual_mean, actual_var: the moments of its inputs in the batches.
        scale, bias: its parameters, ones and zeros where it has none.
        shift: |actual - running mean| in running deviations.
        divergence: of normal distributions with these moments, KL(actual || running), in nats.
        modes_apart: root mean square of how far the normalized outputs of both modes differ.
        samples: effective samples of a statistic in training: how many independent values would
            give an equally exact mean. Neighboring positions of one image are not independent.
        devices_apart: largest difference between statistics of the devices, in deviations.
        redundant_bias: path of the layer before, if it has a bias, which this layer subtracts.
        never_updated: whether the running statistics are those of a new layer.
    """

    path: str
    epsilon: float
    running_mean: np.ndarray
    running_var: np.ndarray
    actual_mean: np.ndarray
    actual_var: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    modes_apart: float
    samples: float
    devices_apart: float = 0.0
    redundant_bias: str | None = None
    never_updated: bool = False
    shift: np.ndarray = field(init=False)
    divergence: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        spread = self.running_var + self.epsilon
        with np.errstate(all="ignore"):
            shift = np.abs(self.actual_mean - self.running_mean) / np.sqrt(spread)
            ratio = (self.actual_var + self.epsilon) / spread
            divergence = (ratio + shift**2 - 1 - np.log(ratio)) / 2
        object.__setattr__(self, "shift", shift)
        object.__setattr__(self, "divergence", divergence)

    @property
    @np.errstate(all="ignore")
    def output_mean(self) -> np.ndarray:
        """The mean of the layer's output in evaluation."""
        apart = (self.actual_mean - self.running_mean) / np.sqrt(self.running_var + self.epsilon)
        return self.scale * apart + self.bias

    @property
    @np.errstate(all="ignore")
    def output_std(self) -> np.ndarray:
        """The standard deviation of the layer's output in evaluation."""
        return np.abs(self.scale) * np.sqrt(self.actual_var / (self.running_var + self.epsilon))


class SeriousFindingError(RuntimeError):
    """A diagnosis has serious findings: outputs in evaluation are wrong, or may be."""


@dataclass(frozen=True)
class Report:
    """All batch norms of a model, what was found, and what to do.

    Attributes:
        norms: one report for each layer that was measured.
        findings: the serious ones first.
        batches: how many were seen.
        outputs_apart: how far the outputs of the model differ between training and evaluation,
            relative to their deviation, dropout included. None if they cannot be compared.
    """

    norms: tuple[NormReport, ...]
    findings: tuple[Finding, ...]
    batches: int
    outputs_apart: float | None = None

    @property
    def healthy(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def raise_if_serious(self) -> None:
        """Fails with the report if there is a serious finding."""
        if any(finding.serious for finding in self.findings):
            raise SeriousFindingError(f"normjax.surgery.diagnose:\n{self}")

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines = [table[0], "-" * len(table[0]), *table[1:], "", self._summary()]
        for remedy, findings in self._by_remedy():
            for finding in findings:
                mark = "!" if finding.serious else "-"
                lines.append(f"{mark} {finding.path or '(the model)'}: {finding.what}")
            lines.append(f"    {remedy}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The table in a notebook."""

        def row(cells: tuple[str, ...], tag: str) -> str:
            inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inner}</tr>"

        header, *rows = self._table()
        findings = "".join(
            "<li>"
            + "<br>".join(
                f"<b>{escape(f.path or '(the model)')}</b>: {escape(f.what)}" for f in group
            )
            + f"<br><i>{escape(remedy)}</i></li>"
            for remedy, group in self._by_remedy()
        )
        body = row(header, "th") + "".join(row(cells, "td") for cells in rows)
        return f"<table>{body}</table><p>{escape(self._summary())}</p><ul>{findings}</ul>"

    def _by_remedy(self) -> Iterable[tuple[str, list[Finding]]]:
        """The findings; those with one remedy are together, so that it is read once."""
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(finding.remedy, []).append(finding)
        return groups.items()

    def _table(self) -> list[tuple[str, ...]]:
        """The header, and a row for each layer."""
        kinds: dict[str, list[str]] = {norm.path: [] for norm in self.norms}
        for finding in self.findings:
            kinds.setdefault(finding.path, []).append(
                finding.kind.upper() if finding.serious else finding.kind
            )
        rows: list[tuple[str, ...]] = [
            ("layer", "channels", "shift", "KL", "modes apart", "samples", "findings")
        ]
        for norm in self.norms:
            numbers = (_rms(norm.shift), norm.divergence.mean(), norm.modes_apart, norm.samples)
            rows.append(
                (
                    norm.path or "(the model)",
                    str(len(norm.shift)),
                    *(f"{number:.3g}" for number in numbers),
                    ", ".join(kinds[norm.path]) or "ok",
                )
            )
        measured = {norm.path for norm in self.norms}
        return rows + [
            (path or "(the model)", *"-----", ", ".join(found))
            for path, found in kinds.items()
            if path not in measured
        ]

    def _summary(self) -> str:
        serious = sum(finding.serious for finding in self.findings)
        plural = "" if len(self.findings) == 1 else "s"
        found = f"{len(self.findings)} finding{plural}, {serious} serious"
        if not self.findings:
            found = "healthy"
        if not self.norms and not self.findings:
            found = "nothing to compare, since all batch norms that ran are frozen"
        apart = ""
        if self.outputs_apart is not None:
            apart = f"; outputs of training and evaluation differ by {self.outputs_apart:.2g}"
        return f"{found}, from {self.batches} batches{apart}"

    def plot(self) -> Any:
        """Draws shift, ratio of the variances, and effective samples; returns the figure.

        The shaded range is not stale: a channel in it is less than 0.1 nats from its running
        statistics if its other moment is right. Colors show the findings of the panel, not of the
        layer: vermilion is serious, orange is a note.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(
                "normjax.surgery: plot() needs matplotlib, which is not installed. "
                "pip install matplotlib."
            ) from None
        figure = Figure(figsize=(12, 2 + 0.32 * len(self.norms)), layout="constrained")
        left, middle, right = figure.subplots(1, 3, sharey=True)
        rows = range(len(self.norms))
        for row, norm in zip(rows, self.norms, strict=True):
            spread = norm.running_var + norm.epsilon
            apart = (norm.actual_mean - norm.running_mean) / np.sqrt(spread)
            ratio = (norm.actual_var + norm.epsilon) / spread
            dots = dict(s=14, color=self._color(norm, OF_STATISTICS), alpha=0.6, linewidths=0)
            left.scatter(apart, [row] * len(apart), **dots)
            middle.scatter(ratio, [row] * len(ratio), **dots)
            right.barh(row, norm.samples, color=self._color(norm, OF_SAMPLES), height=0.6)
        left.set_xscale("symlog", linthresh=1)
        left.set(title="mean", xlabel="(actual - running mean) / running deviation")
        middle.set(title="variance", xscale="log", xlabel="actual / running variance")
        right.set(title="samples", xscale="log", xlabel="effective samples of a statistic")
        for axes, line, around in (
            (left, 0, (-1, 1)),
            (middle, 1, (0.1, 10)),
            (right, FEW_SAMPLES, (1, 99)),
        ):
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, around[0]), max(high, around[1]))
            axes.axvline(line, color="gray", lw=0.8, ls="--")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        left.axvspan(-STALE_SHIFT, STALE_SHIFT, color=OK, alpha=0.1, lw=0)
        middle.axvspan(*STALE_RATIO, color=OK, alpha=0.1, lw=0)
        right.axvspan(FEW_SAMPLES, right.get_xlim()[1], color=OK, alpha=0.1, lw=0)
        left.set_yticks(rows, [norm.path or "(the model)" for norm in self.norms])
        left.invert_yaxis()
        figure.suptitle(
            f"{self._summary()}\nshaded: healthy; vermilion: serious, orange: note",
            fontsize=10,
        )
        return figure

    def _color(self, norm: NormReport, kinds: set[str]) -> str:
        """The color of the worst of these findings in a layer."""
        found = [f.serious for f in self.findings if f.path == norm.path and f.kind in kinds]
        return SERIOUS if any(found) else NOTED if found else OK


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
