"""Walking through a data set: compiled, with a bar, merged as a tree, every fault told in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from operator import length_hint
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax.surgery._layers import editing
from normjax.surgery._paths import At, Path, at_path, norms, with_stats, written
from normjax.surgery._record import SLOT, Measure, Record

Records = dict[Path, Record]


class Seen(NamedTuple):
    """One batch: what the layers saw, what the model returned, whether all of it is finite."""

    records: Records
    outputs: Any
    finite: Any


def walk(
    called: str,
    call: Callable,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    at: At,
    limit: int | None,
    progress: bool,
    each: Callable[[Seen, Any], None] = lambda seen, batch: None,
) -> Records:
    """The merged records of the chosen layers over all batches; `each` is shown every batch."""
    found = norms(called, variables, at)
    step = _compiled(called, call, variables, found)
    centers = {path: _finite(node["mean"]) for path, node in found.items()}
    tree, finite, first, centered = _Tree(), [], None, False
    for number, batch in enumerate(_bar(called, batches, limit, progress)):
        shapes = jax.tree.map(np.shape, batch)
        first = shapes if first is None else first
        try:
            if not centered:
                # The first batch in which anything counts gives the center, and runs twice.
                there = step(centers, batch).records
                centers = {path: r.center + r.moments.mean for path, r in there.items()}
                centered = all(np.any(r.moments.count) for r in there.values() if np.any(r.batches))
            seen = step(centers, batch)
        except Exception as error:
            if shapes == first:
                error.add_note(f"{called}: in batch {number} (counted from 0), of shapes {shapes}.")
                raise
            raise ValueError(
                f"{called}: batch {number} (counted from 0) has the shapes {shapes}, the first one "
                f"had {first}, and the model does not take it: {error}"
            ) from error
        tree.add(seen.records)
        finite.append(seen.finite)
        each(seen, batch)
    if first is None:
        raise ValueError(
            f"{called}: the batches are empty, expected at least one. An iterator that was walked "
            "through before is empty, too: pass a list, or make it anew."
        )
    return _checked(called, tree.whole(), finite)


def _finite(mean: Any) -> Any:
    """A center to start from, also where a running mean is beyond use."""
    mean = jnp.asarray(mean)
    return jnp.where(jnp.isfinite(mean), mean, jnp.zeros_like(mean))


def _compiled(
    called: str, call: Callable, variables: Mapping[str, Any], found: Mapping[Path, Any]
) -> Callable:
    measuring = Measure(called)

    @jax.jit
    def step(variables: Any, centers: Any, batch: Any) -> Seen:
        slots = {path: {SLOT: Record.start(center)} for path, center in centers.items()}
        with editing(measuring):
            out = call(with_stats(variables, slots), batch, train=True, mutable=["batch_stats"])
        try:
            outputs, updates = out
            records = {path: at_path(updates["batch_stats"], path)[SLOT] for path in slots}
        except (TypeError, ValueError, KeyError, IndexError):
            raise TypeError(
                f"{called}: call(variables, batch, train=True, mutable=['batch_stats']) must "
                "return (outputs, updates) with the updated 'batch_stats', as model.apply does. "
                "Pass mutable on: model.apply(variables, ..., train=train, mutable=mutable)."
            ) from None
        finite = [jnp.isfinite(r.moments.m2).all() for r in records.values()]
        return Seen(records, outputs, jnp.stack(finite).all())

    return lambda centers, batch: step(variables, centers, batch)


class _Tree:
    """Merges as a binary tree, so that rounding grows with the logarithm of the batches."""

    def __init__(self) -> None:
        self.branches: list[tuple[int, Records]] = []

    def add(self, records: Records) -> None:
        size = 1
        while self.branches and self.branches[-1][0] == size:
            records, size = _join(self.branches.pop()[1], records), 2 * size
        self.branches.append((size, records))

    def whole(self) -> Records:
        _, records = self.branches.pop()
        while self.branches:
            records = _join(self.branches.pop()[1], records)
        return records


@jax.jit
def _join(first: Records, second: Records) -> Records:
    return {path: record.merged(second[path]) for path, record in first.items()}


def _checked(called: str, records: Records, finite: list[Any]) -> Records:
    """Records that are finite, of layers that ran in training mode."""
    ran = {path: record for path, record in records.items() if np.any(record.batches)}
    if not ran:
        raise ValueError(
            f"{called}: call(..., train=True) ran none of the batch norms "
            f"{sorted(map(written, records))} in training mode. Pass train on to the model."
        )
    if not np.all(finite):
        bad = [
            written(p) for p, r in ran.items() if not np.isfinite(np.asarray(r.moments.m2)).all()
        ]
        raise ValueError(
            f"{called}: what reaches the batch norms {bad} is not finite, or has squares beyond "
            f"float32, first in batch {int(np.argmin(finite))} (counted from 0). Leave such "
            "examples out, or mask them; the variables are as they were."
        )
    return ran


def _bar(called: str, batches: Iterable[Any], limit: int | None, progress: bool) -> Iterator[Any]:
    """The batches, up to the limit, with a bar on a terminal."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{called}: limit={limit!r}, expected a number of batches, or None.")
    try:
        chosen = islice(iter(batches), limit)
    except TypeError:
        raise TypeError(
            f"{called}: batches is {type(batches).__name__}, expected an iterable of batches."
        ) from None
    known = [n for n in (length_hint(batches), limit) if n]
    total = min(known, default=None)
    name = called.rsplit(".", 1)[-1]
    if not progress or not sys.stderr.isatty():
        yield from chosen
        return
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        for number, batch in enumerate(chosen, 1):
            print(f"\r{name}: batch {number} of {total or '?'}", end="", file=sys.stderr)
            yield batch
        print(file=sys.stderr)
    else:
        yield from tqdm(chosen, total=total, desc=name, unit="batch")
