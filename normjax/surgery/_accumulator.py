"""Records of the inputs of batch norms: measured while the model runs, merged over batches."""

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
from normjax.surgery._paths import Path, chosen, path_name

# Accumulators are stored in `batch_stats`, the one collection that Flax's transformations (scan,
# vmap, remat, jit) of a batch norm must include.
SLOT = "normjax_record"

DID_NOT_RUN = "did not run"


class Accumulator(NamedTuple):
    """The record of a layer; arrays have the shape of the running mean, also in scan and vmap.

    Attributes:
        center: is subtracted before measuring. Large means are too coarse in float32 to be merged;
            their distances from a center are not.
        moments: of x - center.
        within: the part of m2 within the examples, not between them.
        examples: number of examples.
        batches: number of calls in training mode.
        evaluated: number of calls in evaluation mode.
        frozen: number of these that are due to `surgery.freeze`.
        ddof: of the layer's running variance.
        epsilon: of the layer.
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
        """An empty record."""
        center = center.astype(accumulation_dtype(center.dtype))
        zero = jnp.zeros(center.shape, center.real.dtype)
        nothing = Moments(zero, jnp.zeros_like(center), zero)
        return cls(center, nothing, *[zero] * (len(cls._fields) - 2))

    def merged(self, other: Accumulator) -> Accumulator:
        """The merge of both records. Their centers are equal unless the first one is empty."""
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
        """Population statistics; the running ones where no entry counts."""
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
    """Updates the record of a layer, where there is one next to its running statistics."""

    called = "normjax.surgery.recompute"

    def __init__(self) -> None:
        super().__init__(None)
        # In the order in which the model runs them.
        self.paths: dict[str, None] = {}
        self.unknown: dict[str, str] = {}

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
        """Stores the message: layers that were not measured are reported afterwards."""
        name = type(module).__name__
        self.unknown[path] = f"is a {name} that {not_recognized(collection)}"

    def elsewhere(self, at: tuple[str, ...] | None, records: Iterable[Path]) -> dict[str, str]:
        """Chosen modules without a record, since their statistics are in another collection."""
        known = set(map(path_name, records))
        found = self.unknown.items()
        return {path: why for path, why in found if path not in known and chosen(path, at)}

    def fault(self, path: str, record: Accumulator) -> str | None:
        """Why a layer was not measured; None if it was, or was frozen on purpose."""
        if np.any(record.batches) or np.any(record.frozen):
            return None
        if path in self.unknown:
            return self.unknown[path]
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
    """Moments of a batch, the part of m2 within its examples, and the number of examples."""
    # The first axis that is not a feature axis has the examples, the others are positions.
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
