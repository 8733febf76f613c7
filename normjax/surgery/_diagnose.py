"""Finds problems of the batch norms of a model, and their remedies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta

from normjax import _errors
from normjax.surgery._accumulator import Accumulator, Measure
from normjax.surgery._batches import expect_batches, over_batches
from normjax.surgery._compiled import Seen
from normjax.surgery._findings import findings_of, findings_unmeasured
from normjax.surgery._layers import Edit, Layer, editing
from normjax.surgery._paths import At, Path, at_path, norms, path_name, patterns
from normjax.surgery._refused import never_updated
from normjax.surgery._report import Finding, NormReport, Report
from normjax.surgery._source import Source, source

CALLED = "normjax.surgery.diagnose"

# Flax's names of scale and bias, and those of copies.
AFFINE = (("scale", "gamma", "weight"), ("bias", "beta", "offset"))


@_errors.named(CALLED, runs_model=True)
def diagnose(
    call: Any,
    variables: Any = None,
    batches: Iterable[Any] | None = None,
    *,
    at: At = None,
    limit: int | None = None,
    progress: bool = True,
) -> Report:
    """Compares the running statistics of batch norms with their inputs, and reports problems.

        shift = |mean - running mean| / s,   s^2 = running var + epsilon
        KL(actual || running) = (r + shift^2 - 1 - log r) / 2,   r = (var + epsilon) / s^2

    Args:
        call: `call(variables, batch, *, train, mutable)`, as in `recompute`.
        variables: all variables of the model, also with the leading device axis of pmap. A model
            of flax.nnx is passed as in `recompute`.
        batches: a few batches of the size of those in training, of data as in evaluation.
        at: patterns over the paths of the layers, all if None.
        limit: the maximal number of batches.
        progress: whether to show a progress bar in a terminal.

    Returns:
        A `Report`. `print(report)` is a table with findings and remedies, `report.norms` and
        `report.findings` are data, `report.plot()` a figure of matplotlib,
        `report.raise_if_serious()` an assertion.

    Guarantees:
        every failure has a name: statistics stale, never updated, not finite, different on the
            devices, not measured; few samples; modes apart; channels dead, exploding or at the
            epsilon floor; a redundant bias before the norm.
        healthy is clean: a healthy model has no findings.
        pure: nothing is changed.

    Edge cases:
        ===================================  ==================================================
        layer that was not measured          a finding: it ran in evaluation, not at all, with
                                             every entry masked, or is not recognized
        layer that is frozen inside call     only its stored statistics are checked
        model compared on odd outputs        outputs_apart is None
        ===================================  ==================================================

    Raises:
        TypeError, ValueError: as `recompute`.

    References:
        Wu, Johnson (2021), Rethinking "Batch" in BatchNorm, arXiv:2105.07576.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from normjax import surgery
        >>> model, x = nn.BatchNorm(), jax.random.normal(jax.random.key(0), (64, 3))
        >>> def call(variables, batch, *, train, mutable=False):
        ...     return model.apply(variables, batch, use_running_average=not train, mutable=mutable)
        >>> variables = model.init(jax.random.key(0), x, use_running_average=True)
        >>> [finding.kind for finding in surgery.diagnose(call, variables, [x]).findings]
        ['never updated']
    """
    held = source(_Measure, call, variables, batches, at)
    run, variables, batches = held.run, held.variables, held.batches
    norms(variables, at)
    expect_batches(batches)
    first, batches = _peek(batches)
    replicas = variables
    if first is not None and held.model is None:
        variables = _first_replica(call, variables, first[0])
    modes, outputs = _ModeDifferences(variables), _Outputs(run, variables)
    biased: list[dict[str, str]] = []

    def each(seen: Seen, batch: Any) -> None:
        if not biased:
            biased.append(_biased(held, variables, batch))
        modes.add(seen.records)
        outputs.add(seen.outputs, batch)

    records = over_batches(run, variables, batches, at, limit, progress, each)
    stacked = replicas is not variables
    reports: list[NormReport] = []
    findings: list[Finding] = []
    # In the order in which the model runs them.
    order = {path: number for number, path in enumerate(run.measure.paths)}
    for path in sorted(records, key=lambda path: order.get(path_name(path), len(order))):
        name, node = path_name(path), at_path(variables["batch_stats"], path)
        devices = _devices_apart(at_path(replicas["batch_stats"], path), stacked)
        if path in modes.samples:
            norm = NormReport(
                path=name,
                epsilon=float(np.max(records[path].epsilon)),
                **_moments(path, records[path], variables),
                modes_apart=float(np.sqrt(np.mean(modes.squares[path]))),
                samples=float(np.mean(modes.samples[path])),
                devices_apart=devices,
                redundant_bias=biased[0].get(name),
                never_updated=never_updated(node),
            )
            reports.append(norm)
            findings += findings_of(norm)
        else:
            fault = run.measure.fault(name, records[path])
            masked = "had every entry masked" if np.any(records[path].batches) else None
            findings += findings_unmeasured(name, node, devices, fault or masked)
    for name, fault in run.measure.elsewhere(patterns(at), records).items():
        findings += findings_unmeasured(name, None, 0.0, fault)
    findings.sort(key=lambda finding: not finding.serious)
    return Report(tuple(reports), tuple(findings), outputs.batches, outputs.difference())


def _moments(
    path: Path, record: Accumulator, variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    node = at_path(variables["batch_stats"], path)
    affine = meta.unbox(at_path(variables.get("params", {}), path))
    center, mean, m2, count = map(
        _flat, (record.center, record.moments.mean, record.moments.m2, record.moments.count)
    )
    scale, bias = (next((affine[n] for n in names if n in affine), None) for names in AFFINE)
    return {
        "running_mean": _flat(node["mean"]),
        "running_var": _flat(node["var"]),
        "actual_mean": center + mean,
        "actual_var": m2 / np.maximum(count, 1),
        "scale": np.ones(len(mean)) if scale is None else _flat(scale),
        "bias": np.zeros(len(mean)) if bias is None else _flat(bias),
    }


def _flat(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64).ravel()


# Numbers that are not finite are reported as findings, not as warnings.
NO_WARNINGS = np.errstate(all="ignore")


class _Measure(Measure):
    called = CALLED


def _biased(held: Source, variables: Any, batch: Any) -> dict[str, str]:
    """The batch norms that follow a layer with a bias, and that layer."""
    if held.model is not None:
        from normjax.surgery._nnx.measure import biased

        return biased(held.model, held.call, batch)
    watch = _Watch()
    watch.trace(held.call, variables, batch)
    return watch.biased


class _Watch(Edit):
    """Finds the layer whose output a batch norm gets, by running the modules."""

    called = CALLED

    def __init__(self) -> None:
        super().__init__(None)
        self.biased: dict[str, str] = {}
        self._made: dict[int, tuple[Any, str]] = {}

    def trace(self, call: Any, variables: Any, batch: Any) -> None:
        """Runs the model on shapes alone."""
        run = lambda v, b: call(v, b, train=True, mutable=["batch_stats"])  # noqa: E731
        with nn.intercept_methods(self._follow), editing(self):
            jax.eval_shape(run, variables, batch)
        self._made.clear()

    def __call__(self, layer: Layer) -> Layer:
        maker = self._made.get(id(layer.x))
        if maker and layer.train and layer.axis in (-1, np.ndim(layer.x) - 1):
            self.biased[layer.path] = maker[1]
        return layer.unmapped()

    def unrecognized(self, path: str, module: Any, collection: str) -> None:
        """Ignored: the edit that measures reports it."""

    def _follow(self, next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        linear = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense)
        if isinstance(context.module, linear) and context.module.use_bias:
            # The output is kept, so that its id is not reused.
            self._made[id(y)] = (y, path_name(context.module.path))
        return y


class _ModeDifferences:
    """For each batch: the difference between both modes, and the samples of a statistic."""

    def __init__(self, variables: Mapping[str, Any]):
        self.stats = variables["batch_stats"]
        self.squares: dict[Path, list[float]] = {}
        self.samples: dict[Path, list[float]] = {}

    @NO_WARNINGS
    def add(self, records: Mapping[Path, Accumulator]) -> None:
        for path, record in records.items():
            count, mean, m2 = map(_flat, record.moments)
            counted = count > 0
            if not counted.any():
                continue
            node, floor = at_path(self.stats, path), _flat(record.epsilon)
            running = np.sqrt(_flat(node["var"]) + floor)
            batch = np.sqrt(m2 / np.maximum(count, 1) + floor)
            shift = (_flat(record.center) + mean - _flat(node["mean"])) / running
            # With x = batch mean + batch deviation * z, training gives z, and evaluation gives
            # shift + batch / running * z.
            squares = shift**2 + (batch / running - 1) ** 2
            self.squares.setdefault(path, []).append(float(squares[counted].mean()))
            samples = _samples(record)[counted] / _flat(record.batches)[counted]
            self.samples.setdefault(path, []).append(float(np.median(samples)))


def _samples(record: Accumulator) -> np.ndarray:
    """Effective samples: the variance divided by the variance of the mean.

    The variance of the mean of a batch is the variance between its examples, divided by their
    number. The result is at least the number of examples, at most the number of values.
    """
    m2, within, examples, count = map(
        _flat, (record.moments.m2, record.within, record.examples, record.moments.count)
    )
    # The part of m2 between the examples is known only up to the rounding of m2.
    limits = np.finfo(float)
    between = np.maximum(m2 - within, limits.eps * m2 + limits.tiny)
    return np.clip((examples - 1) * m2 / between, examples, np.maximum(count, examples))


class _Outputs:
    """How far the outputs of the model differ between the modes."""

    def __init__(self, run: Any, variables: Any):
        self.run = functools.partial(run.serve, variables)
        self.batches, self.squares, self.values = 0, 0.0, list[np.ndarray]()
        self.comparable = True

    @NO_WARNINGS
    def add(self, trained: Any, batch: Any) -> None:
        served, trained = (jax.tree.leaves(out) for out in (self.run(batch), trained))
        self.batches += 1
        if [np.shape(leaf) for leaf in served] != [np.shape(leaf) for leaf in trained]:
            self.comparable = False
        if self.comparable:
            t, s = (
                np.concatenate([_flat(leaf) for leaf in leaves]) for leaves in (trained, served)
            )
            self.squares += float(np.sum((t - s) ** 2))
            self.values.append(s)

    @NO_WARNINGS
    def difference(self) -> float | None:
        """The root mean square of the difference, relative to the deviation."""
        values = np.concatenate(self.values) if self.comparable and self.values else np.zeros(0)
        spread = float(np.std(values)) if values.size else 0.0
        ratio = float(np.sqrt(self.squares / values.size) / spread) if spread else np.nan
        return ratio if np.isfinite(ratio) else None


def _peek(batches: Any) -> tuple[list[Any] | None, Any]:
    """The first batch, and an iterable that still has it."""
    iterator = iter(batches)
    for first in iterator:
        return [first], chain([first], iterator) if iterator is batches else batches
    return None, []


def _first_replica(call: Callable, variables: Mapping[str, Any], batch: Any) -> Mapping[str, Any]:
    """The variables that the model takes: those of one device if pmap stacked them."""
    leaves = jax.tree.leaves(variables)
    if len({np.shape(leaf)[:1] for leaf in leaves}) > 1 or np.ndim(leaves[0]) < 2:
        return variables
    watch = _Watch()
    try:
        watch.trace(call, variables, batch)
    except Exception:
        # The model does not take them. If it takes those of one device, they are stacked.
        one = jax.tree.map(lambda leaf: leaf[0], variables)
        try:
            watch.trace(call, one, batch)
        except Exception:
            return variables
        return one
    return variables


@NO_WARNINGS
def _devices_apart(node: Mapping[str, Any], stacked: bool) -> float:
    """The largest difference between devices, in deviations."""
    mean, var = (_replicas(node[name], stacked) for name in ("mean", "var"))
    spread = np.maximum(var[0], np.finfo(np.float32).tiny)
    means, variances = np.ptp(mean, axis=0) / np.sqrt(spread), np.ptp(var, axis=0) / spread
    return float(max(means.max(), variances.max()))


def _replicas(leaf: Any, stacked: bool) -> np.ndarray:
    """The values of each device along the first axis, which has size 1 for one device."""
    if stacked:
        return np.asarray(leaf, np.float64)
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        return np.stack([np.asarray(s.data, np.float64) for s in leaf.addressable_shards])
    return np.asarray(leaf, np.float64)[None]
