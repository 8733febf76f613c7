"""What a batch norm saw in one batch, or in all of them: measured as it runs, merged afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from normjax import Moments, _errors, measure, merge, synchronize
from normjax._core.dtypes import accumulation_dtype
from normjax._core.moments import collapse
from normjax.surgery._layers import Edit, Layer, not_recognized
from normjax.surgery._paths import Path, chosen, written

# Accumulators travel inside `batch_stats`: whatever Flax lifts a layer through (scan, vmap, remat,
# jit) carries that collection, and no other for sure.
SLOT = "normjax_record"

DID_NOT_RUN = "did not run"


class Accumulator(NamedTuple):
    """Every array has the shape of the running mean, axes of scan and vmap included.

    Attributes:
        center: what was subtracted before measuring. Means of float32 are too coarse to be merged
            if they are large; their distances from a center are not.
        moments: of x - center.
        within: the part of m2 that lies within the examples and not between them.
        examples: how many examples.
        batches: how many calls in training mode.
        evaluated: how many calls in evaluation mode.
        frozen: how many of these because `surgery.freeze` says so.
        ddof: what the layer takes off the count for its running variance.
        epsilon: what it adds to a variance.
    """

    center: Array
    moments: Moments
    within: Array
    examples: Array
    batches: Array
    evaluated: Array
    frozen: Array
    ddof: Array
    epsilon: Array

    @classmethod
    def start(cls, center: Array) -> Accumulator:
        """Nothing seen yet."""
        center = center.astype(accumulation_dtype(center.dtype))
        zero = jnp.zeros(center.shape, center.real.dtype)
        nothing = Moments(zero, jnp.zeros_like(center), zero)
        return cls(center, nothing, *[zero] * (len(cls._fields) - 2))

    def merged(self, other: Accumulator) -> Accumulator:
        """What both saw. The center is the same, unless the first has seen nothing yet."""
        return Accumulator(
            center=other.center,
            moments=merge(self.moments, other.moments),
            within=self.within + other.within,
            examples=self.examples + other.examples,
            batches=self.batches + other.batches,
            evaluated=self.evaluated + other.evaluated,
            frozen=self.frozen + other.frozen,
            ddof=jnp.maximum(self.ddof, other.ddof),
            epsilon=jnp.maximum(self.epsilon, other.epsilon),
        )

    def stats(self, node: Mapping[str, Any]) -> dict[str, Array]:
        """Population statistics in place of the running ones; as they were where nothing counts."""
        seen = self.moments.count > self.ddof
        new = {
            "mean": self.center + self.moments.mean,
            "var": self.moments.variance(self.ddof),  # type: ignore[arg-type]
            "count": self.batches,
        }
        old = {name: jnp.asarray(node[name]) for name in new if name in node}
        return {
            name: jnp.where(seen, new[name].astype(leaf.dtype), leaf) for name, leaf in old.items()
        }


class Measure(Edit):
    """Writes a record where one was put beside the running statistics."""

    called = "normjax.surgery.recompute"

    def __init__(self) -> None:
        super().__init__(None)
        # In the order in which the model runs them.
        self.paths: dict[str, None] = {}
        self.strangers: dict[str, str] = {}

    def __call__(self, layer: Layer) -> Layer:
        layer, module = layer.unmapped(), layer.module
        self.paths.setdefault(layer.path)
        if not module.has_variable("batch_stats", SLOT):
            return layer
        record = module.get_variable("batch_stats", SLOT)
        if layer.train:
            seen = _see(layer, record.center)
            module.put_variable("batch_stats", SLOT, record.merged(seen))
        elif module.is_mutable_collection("batch_stats"):
            seen = record._replace(
                evaluated=record.evaluated + 1, frozen=record.frozen + layer.frozen
            )
            module.put_variable("batch_stats", SLOT, seen)
        return layer

    def unrecognized(self, path: str, module: Any, collection: str) -> None:
        """Kept for the words: what was not measured is named afterwards."""
        name = type(module).__name__
        self.strangers[path] = f"is a {name} that {not_recognized(collection)}"

    def elsewhere(self, at: tuple[str, ...] | None, records: Iterable[Path]) -> dict[str, str]:
        """Chosen modules with statistics that are in no record, since they keep them elsewhere."""
        known = set(map(written, records))
        found = self.strangers.items()
        return {path: why for path, why in found if path not in known and chosen(path, at)}

    def fault(self, path: str, record: Accumulator) -> str | None:
        """Why a layer was not measured; None if it was, or was frozen on purpose."""
        if np.any(record.batches) or np.any(record.frozen):
            return None
        if path in self.strangers:
            return self.strangers[path]
        if np.any(record.evaluated):
            return "ran in evaluation mode, though call was given train=True"
        return DID_NOT_RUN


def _see(layer: Layer, center: Array) -> Accumulator:
    x, axis = jnp.asarray(layer.x), layer.axis
    axes = _errors.features(x.shape, axis)
    features, reduced = axes.shape, axes.reduced
    if prod(features) != prod(center.shape):
        raise ValueError(
            f"normjax: the batch norm at '{layer.path}' is given features of shape {features}, "
            f"expected {center.shape}, that of its statistics. The batches are not those of this "
            "model, or the features lie on another axis than the layer says."
        )
    # In NNX the statistics of several feature axes are one vector.
    middle = jnp.expand_dims(center.reshape(features), reduced)
    x = x.astype(accumulation_dtype(x.dtype, center.dtype)) - middle
    moments, within, examples = _measure(x, reduced, _errors.nonzero(layer.mask))
    if layer.axis_name is not None:
        options: dict[str, Any] = dict(axis_index_groups=layer.axis_index_groups)
        moments = synchronize(moments, layer.axis_name, **options)
        within, examples = lax.psum((within, examples), layer.axis_name, **options)
    moments, within, examples = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, features).reshape(center.shape),
        (moments, within, examples),
    )
    one, none = jnp.ones_like(within), jnp.zeros_like(within)
    return Accumulator(
        center=center,
        moments=moments,
        within=within,
        examples=examples,
        batches=one,
        evaluated=none,
        frozen=none,
        ddof=one * getattr(layer.module, "ddof", 0),
        epsilon=one * layer.epsilon,
    )


def _measure(x: Array, reduced: tuple[int, ...], mask: Array | None) -> tuple[Moments, Any, Any]:
    """Moments of a batch, what of m2 lies within its examples, and how many these are."""
    # The first axis that is not of features is that of examples, the others are positions.
    first, *positions = reduced
    if not positions:
        moments = measure(x, reduced, mask)
        return moments, jnp.zeros_like(moments.m2), moments.count
    each = measure(x, positions, mask)
    leaves = (leaf if jnp.ndim(leaf) == 0 else jnp.moveaxis(leaf, first, 0) for leaf in each)
    stacked = Moments(*leaves)  # type: ignore[arg-type]
    counted = jnp.broadcast_to(stacked.count > 0, stacked.m2.shape)
    moments = collapse(stacked)
    return moments, stacked.m2.sum(0), counted.sum(0).astype(moments.m2.dtype)
