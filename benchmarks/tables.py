"""Measurements as Markdown: relative times, all figures of each layer, and geometric means."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.calls import EVALUATION, TRAINING


class Measurement(NamedTuple):
    """One library on one layer in one dtype and mode; times in seconds."""

    layer: str
    dtype: str
    mode: str
    contender: str
    times: tuple[float, ...]
    copy: float  # time of a copy of x: one read and one write
    nbytes: int  # of x
    tensors_moved: int  # the least traffic, in tensors of the size of x
    compile_seconds: float | None
    kept_bytes: int | None
    temporary_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        return spread(self.times)

    @property
    def bandwidth(self) -> float:
        """Bytes per second; only the least traffic counts."""
        return self.nbytes * self.tensors_moved / self.median

    @property
    def over_floor(self) -> float:
        """The time divided by that of a copy with the least traffic."""
        return self.median / (self.copy * self.tensors_moved / 2)


def spread(times: Sequence[float]) -> float:
    """Half of the interquartile range, relative to the median."""
    if len(times) < 2:
        return 0.0
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / median


class Row(NamedTuple):
    """All libraries on one layer in one dtype and mode."""

    layer: str
    dtype: str
    mode: str
    contenders: dict[str, Measurement]

    def ratios(self, baseline: str) -> dict[str, float]:
        """The time of each library divided by the baseline's. Above 1, the baseline is faster."""
        if baseline not in self.contenders:
            return {}
        base = self.contenders[baseline].median
        return {name: m.median / base for name, m in self.contenders.items() if name != baseline}


def rows_of(measurements: Iterable[Measurement]) -> list[Row]:
    rows: dict[tuple[str, str, str], Row] = {}
    for m in measurements:
        key = (m.layer, m.dtype, m.mode)
        rows.setdefault(key, Row(*key, {})).contenders[m.contender] = m
    return list(rows.values())


def names_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.contenders))


def means(rows: Sequence[Row], baseline: str) -> dict[tuple[str, str, str], float]:
    """Geometric means of the ratios, by (mode, dtype, library)."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for name, ratio in row.ratios(baseline).items():
            ratios.setdefault((row.mode, row.dtype, name), []).append(ratio)
    return {key: statistics.geometric_mean(values) for key, values in ratios.items()}


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def header(cells: Sequence[str]) -> Iterator[str]:
    yield line(cells)
    yield "|" + "---|" * len(cells)


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}{unit}"


def ratios_table(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    """One line for each layer: the baseline over the floor, and the others over the baseline."""
    names = [name for name in names_of(rows) if name != baseline]
    yield from header(
        ["layer", "dtype", "mode", f"{baseline} ms", "times the floor", "GB/s", *names]
    )
    for row in rows:
        if baseline not in row.contenders:
            continue
        own, ratios = row.contenders[baseline], row.ratios(baseline)
        yield line(
            [row.layer, row.dtype, row.mode, f"{1e3 * own.median:.2f} ±{own.spread:.0%}"]
            + [f"{own.over_floor:.2f}", f"{own.bandwidth / 1e9:.1f}"]
            + [f"{ratios[name]:.2f}" if name in ratios else "" for name in names]
        )
    for (mode, dtype), found in grouped_means(rows, baseline).items():
        cells = [f"{found[name]:.2f}" if name in found else "" for name in names]
        yield line(["**geometric mean**", dtype, mode, "", "", "", *cells])


def grouped_means(rows: Sequence[Row], baseline: str) -> dict[tuple[str, str], dict[str, float]]:
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for (mode, dtype, name), mean in means(rows, baseline).items():
        groups.setdefault((mode, dtype), {})[name] = mean
    order = [TRAINING, EVALUATION]
    return dict(sorted(groups.items(), key=lambda g: (order.index(g[0][0]), g[0][1] != "float32")))


def details_table(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    """One line for each library: all figures."""
    names = ["layer", "dtype", "mode", "library", "ms", f"over {baseline}", "GB/s"]
    names += ["times the floor", "kept for backward, MB", "temporary, MB", "compile s"]
    yield from header(names)
    for row in rows:
        ratios = row.ratios(baseline)
        for name, m in row.contenders.items():
            cells = [row.layer, row.dtype, row.mode, name, f"{1e3 * m.median:.2f} ±{m.spread:.0%}"]
            cells += [f"{ratios[name]:.2f}" if name in ratios else ""]
            cells += [f"{m.bandwidth / 1e9:.1f}", f"{m.over_floor:.2f}"]
            cells += [megabytes(m.kept_bytes), megabytes(m.temporary_bytes)]
            cells += [number(m.compile_seconds, digits=2)]
            yield line(cells)


def megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.1f}"


def means_in_words(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    """The geometric means, one line for each dtype and mode."""
    for (mode, dtype), found in grouped_means(rows, baseline).items():
        ratios = ", ".join(f"{name} {mean:.2f}" for name, mean in found.items())
        yield f"geometric mean, {mode}, {dtype}: {ratios} times the time of {baseline}"
