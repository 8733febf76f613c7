"""Runs a model over batches: progress bar, records merged as a tree, errors of batches."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from operator import length_hint
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax.surgery._compiled import CALL, Accumulators, Seen
from normjax.surgery._paths import At, norms, path_name


def over_batches(
    compiled: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    at: At,
    limit: int | None,
    progress: bool,
    each: Callable[[Seen, Any], None],
) -> Accumulators:
    """The merged records of the chosen layers over all batches; calls `each` for every batch."""
    called, step = compiled.measure.called, compiled.step
    bar = called.rsplit(".", 1)[-1] if progress and sys.stderr.isatty() else None
    found = norms(variables, at)
    expect_batches(batches)
    centers = {path: _finite(node["mean"]) for path, node in found.items()}
    tree, finite, first, centered = _Tree(), [], None, False
    for number, batch in enumerate(_bar(batches, limit, bar)):
        _expect_arrays(number, batch)
        shapes = jax.tree.map(np.shape, batch)
        first = shapes if first is None else first
        try:
            if not centered:
                # The first batch in which any entry counts gives the center, and runs twice.
                there = step(variables, centers, batch).records
                centers = {path: r.center + r.moments.mean for path, r in there.items()}
                centered = all(np.any(r.moments.count) for r in there.values() if np.any(r.batches))
            seen = step(variables, centers, batch)
        except Exception as error:
            _reword(error, number, batch, shapes, first, compiled.takes_part)
            error.add_note(f"{called}: in batch {number} (counted from 0), of shapes {shapes}.")
            raise
        tree.add(seen.records)
        finite.append(seen.finite)
        each(seen, batch)
    if first is None:
        raise ValueError(
            "normjax: the batches are empty, expected at least one. An iterator that was used "
            "before is empty, too: pass a list, or create it again."
        )
    records = tree.whole()
    _expect_finite(records, finite)
    return records


def expect_batches(batches: Any) -> None:
    """Rejects a single batch, over which Python could iterate."""
    if hasattr(batches, "shape") or hasattr(batches, "__array__"):
        kind, means = f"an array of shape {np.shape(batches)}", "its rows one by one"
    elif isinstance(batches, Mapping):
        kind, means = f"a {type(batches).__name__}", "its keys"
    elif isinstance(batches, tuple):
        kind, means = "a tuple", "each of its entries as a batch, and it may be one batch"
    elif isinstance(batches, str | bytes):
        kind, means = f"{batches!r}", "its characters"
    elif isinstance(batches, Iterable):
        return
    else:
        raise TypeError(
            f"normjax: batches is {type(batches).__name__}, expected an iterable of batches."
        )
    raise TypeError(
        f"normjax: batches is {kind}, expected an iterable of batches; this would take {means}. "
        "Pass [batch] for one batch, or a list or a generator of batches."
    )


def _expect_arrays(number: int, batch: Any) -> None:
    """A batch consists of arrays."""
    for leaf in jax.tree.leaves(batch):
        known = isinstance(leaf, jax.Array | int | float | complex) or hasattr(
            leaf, "__jax_array__"
        )
        numbers = isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind not in "OSUMm"
        if not known and not numbers:
            kind = type(leaf)
            raise TypeError(
                f"normjax: batch {number} (counted from 0) holds a {kind.__module__}."
                f"{kind.__qualname__}, expected arrays of NumPy or JAX. Pass a generator: "
                "(np.asarray(images) for images, _ in loader)."
            )


def _reword(
    error: Exception, number: int, batch: Any, shapes: Any, first: Any, takes_part: str
) -> None:
    """Raises a clearer error: the call, its arguments, and what to do."""
    where = f"batch {number} (counted from 0)"
    if shapes != first:
        raise ValueError(
            f"normjax: {where} has the shapes {shapes}, the first one had {first}, and the model "
            f"does not take it: {error}"
        ) from error
    ours = str(error).startswith("normjax")
    unknown = re.search(r"unexpected keyword argument '(train|mutable)'", str(error))
    if isinstance(error, TypeError) and not ours and unknown:
        raise TypeError(
            f"normjax: call was called with train=True and mutable=['batch_stats'] and does not "
            f"take them: {error} Pass a function that does, such as\n{CALL}"
        ) from error
    bare = isinstance(error, TypeError | AttributeError | ValueError) and not ours
    if bare and isinstance(batch, tuple | list | Mapping):
        kind = type(batch).__name__
        raise TypeError(
            f"normjax: call does not take {where}, a {kind} of the shapes {shapes}: "
            f"{type(error).__name__}: {error}. A batch is passed to call unchanged. If the model "
            f"takes a part of it, {takes_part}, or pass a generator, (images for images, labels in "
            "batches)."
        ) from error


def _finite(mean: Any) -> Any:
    """The initial center: the running mean, or 0 where it is too large or not finite."""
    mean = jnp.asarray(mean)
    # Centered values are squared and summed in float32.
    return jnp.where(jnp.abs(mean) < 1e15, mean, jnp.zeros_like(mean))


class _Tree:
    """Merges as a binary tree, so that rounding grows with the logarithm of the batches."""

    def __init__(self) -> None:
        self.branches: list[tuple[int, Accumulators]] = []

    def add(self, records: Accumulators) -> None:
        size = 1
        while self.branches and self.branches[-1][0] == size:
            records, size = _join(self.branches.pop()[1], records), 2 * size
        self.branches.append((size, records))

    def whole(self) -> Accumulators:
        _, records = self.branches.pop()
        while self.branches:
            records = _join(self.branches.pop()[1], records)
        return records


@jax.jit
def _join(first: Accumulators, second: Accumulators) -> Accumulators:
    return {path: record.merged(second[path]) for path, record in first.items()}


def _expect_finite(records: Accumulators, finite: list[Any]) -> None:
    """Rejects accumulators that are not finite."""
    if not np.all(finite):
        bad = [
            path_name(p)
            for p, r in records.items()
            if not np.isfinite(np.asarray(r.moments.m2)).all()
        ]
        raise ValueError(
            f"normjax: the inputs of the batch norms {bad} are not finite, or their squares "
            f"overflow float32, first in batch {int(np.argmin(finite))} (counted from 0). Leave "
            "such examples out, or mask them; the variables are unchanged."
        )


def _bar(batches: Iterable[Any], limit: int | None, name: str | None) -> Iterator[Any]:
    """The batches, up to the limit, with a bar of this name, or none."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"normjax: limit={limit!r}, expected a number of batches, or None.")
    chosen = islice(iter(batches), limit)
    known = [n for n in (length_hint(batches), limit) if n]
    total = min(known, default=None)
    if name is None:
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
