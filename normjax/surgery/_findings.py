"""Findings from the numbers of a report, with the reason for each bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from normjax.surgery._refused import never_updated
from normjax.surgery._report import FEW_SAMPLES, STALE, Finding, NormReport

# Outputs of a norm are of the size of its scale, which is about one.
DEAD, EXPLODING = 1e-3, 100
# Modes half a deviation apart, with statistics that are right on average.
MODES_APART = 0.5
# Devices that share statistics hold the same bits; this leaves room for sums in another order.
DEVICES_APART = 1e-4

NOT_FINITE = "not finite"


def findings_of(norm: NormReport) -> Iterator[Finding]:
    """All findings of one layer."""

    def finding(kind: str, what: str, remedy: str, serious: bool = False) -> Finding:
        return Finding(norm.path, kind, serious, what, remedy)

    divergence = float(norm.divergence.mean())
    stats = (norm.running_mean, norm.running_var)
    stored = list(_stored(finding, stats, norm.never_updated, norm.devices_apart))
    yield from stored
    if any(found.kind == NOT_FINITE for found in stored):
        return
    if not norm.never_updated and divergence > STALE:
        worst = int(np.argmax(norm.divergence))
        ratio = norm.actual_var[worst] / max(norm.running_var[worst], np.finfo(np.float32).tiny)
        yield finding(
            "stale",
            f"the running statistics are {divergence:.2g} nats from the actual ones; at worst, in "
            f"channel {worst}, the actual mean is {norm.shift[worst]:.2g} deviations away and the "
            f"actual variance is {ratio:.2g} times the running one.",
            "Call surgery.recompute on data as in evaluation.",
            serious=True,
        )
    few = norm.samples < FEW_SAMPLES
    if few:
        yield finding(
            "few samples",
            f"a statistic has {norm.samples:.2g} effective samples, of {FEW_SAMPLES} wanted.",
            f"Use larger batches, share over {ceil(FEW_SAMPLES / norm.samples)} times as many "
            "devices (surgery.synchronize), or use group norm (surgery.convert).",
        )
    stale = norm.never_updated or divergence > STALE
    if norm.modes_apart > MODES_APART and not (stale or few):
        yield finding(
            "modes apart",
            f"the outputs of training and evaluation differ by {norm.modes_apart:.2g} deviations, "
            "though the statistics are right on average: batches differ.",
            "Shuffle, so that each batch represents the data; or use batch renormalization.",
        )
    yield from _channels(norm, finding)
    if norm.redundant_bias is not None:
        yield finding(
            "redundant bias",
            f"'{norm.redundant_bias}' has a bias, which this layer subtracts again.",
            "Set use_bias=False there, unless its output is also used elsewhere.",
        )


def findings_unmeasured(
    path: str, node: Mapping[str, Any] | None, devices_apart: float, fault: str | None
) -> Iterator[Finding]:
    """Findings of the stored statistics; and why the layer was not measured, unless on purpose."""

    def finding(kind: str, what: str, remedy: str, serious: bool = False) -> Finding:
        return Finding(path, kind, serious, what, remedy)

    if fault is not None:
        yield finding(
            "not measured",
            f"the layer {fault}.",
            "Check that the model passes train to this layer: without it the layer does not learn "
            "statistics. If this is intended, name the others: at=.",
            serious=True,
        )
    if node is not None:
        stats = [np.asarray(node[name], np.float64) for name in ("mean", "var")]
        yield from _stored(finding, stats, never_updated(node), devices_apart)


def _stored(
    finding: Callable, stats: Sequence[np.ndarray], new: bool, devices_apart: float
) -> Iterator[Finding]:
    """Stored statistics that differ between devices, are not finite, or those of a new layer."""
    if devices_apart > DEVICES_APART:
        yield finding(
            "devices differ",
            f"the devices hold statistics up to {devices_apart:.2g} deviations apart.",
            "Train with axis_name= (or surgery.synchronize), and recompute.",
            serious=True,
        )
    finite = np.isfinite(stats[0]) & np.isfinite(stats[1])
    if not finite.all():
        yield finding(
            NOT_FINITE,
            f"{np.sum(~finite)} of {finite.size} channels have running statistics that are NaN or "
            "infinite.",
            "Call surgery.reset, then surgery.recompute; normjax.linen.BatchNorm ignores NaN.",
            serious=True,
        )
    elif new:
        yield finding(
            "never updated",
            "the running statistics are those of a new layer, mean 0 and variance 1.",
            "Train and keep the statistics (linen: the updates of mutable=['batch_stats']), or "
            "call surgery.recompute.",
            serious=True,
        )


def _channels(norm: NormReport, finding: Callable) -> Iterator[Finding]:
    """Channels that are nearly constant, too large, or of the size of epsilon."""
    size = np.hypot(norm.output_mean, norm.output_std)
    dead = norm.output_std < DEAD
    floor = (norm.running_var <= norm.epsilon) & ~dead
    if norm.never_updated:
        return
    if dead.any():
        constant = np.sum(dead & (np.abs(norm.scale) >= DEAD))
        yield finding(
            "dead channels",
            f"{_few(dead)} have a constant output: {constant} have a constant input, "
            f"{dead.sum() - constant} a scale of 0.",
            "Prune them; if there are many, lower the learning rate or the weight decay of scale.",
        )
    if (size > EXPLODING).any():
        yield finding(
            "exploding",
            f"{_few(size > EXPLODING)} have outputs of the size {size.max():.2g}.",
            "Check scale and bias, and running variances that are too small.",
            serious=True,
        )
    if floor.any():
        yield finding(
            "epsilon floor",
            f"{_few(floor)} have a variance not above epsilon = {norm.epsilon:.2g}, which then "
            "determines the output.",
            "Use a smaller epsilon, or inputs (weights before) of a larger scale.",
        )


def _few(chosen: np.ndarray) -> str:
    numbers = np.flatnonzero(chosen)
    listed = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} of {len(chosen)} channels ({listed})"
