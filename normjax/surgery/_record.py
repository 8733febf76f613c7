"""What a batch norm saw in one batch, or in all of them: measured as it runs, merged afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from normjax import Moments, _checks, measure, merge, synchronize
from normjax._moments import collapse, wide
from normjax.linen._params import as_mask
from normjax.surgery._layers import Edit, Layer

# Records travel inside `batch_stats`: whatever Flax lifts a layer through (scan, vmap, remat,
# jit) carries that collection, and no other for sure.
SLOT = "normjax_record"


class Record(NamedTuple):
    """Every array has the shape of the running mean, axes of scan and vmap included.

    Attributes:
        center: what was subtracted before measuring. Means of float32 are too coarse to be merged
            if they are large; their distances from a center are not.
        moments: of x - center.
        within: the part of m2 that lies within the examples and not between them.
        examples: how many examples.
        batches: how many calls in training mode.
        ddof: what the layer takes off the count for its running variance.
    """

    center: Array
    moments: Moments
    within: Array
    examples: Array
    batches: Array
    ddof: Array

    @classmethod
    def start(cls, center: Array) -> Record:
        """Nothing seen yet."""
        center = center.astype(wide(center.dtype))
        zero = jnp.zeros(center.shape, center.real.dtype)
        return cls(center, Moments(zero, jnp.zeros_like(center), zero), zero, zero, zero, zero)

    def merged(self, other: Record) -> Record:
        """What both saw. The center is the same, unless the first has seen nothing yet."""
        return Record(
            center=other.center,
            moments=merge(self.moments, other.moments),
            within=self.within + other.within,
            examples=self.examples + other.examples,
            batches=self.batches + other.batches,
            ddof=jnp.maximum(self.ddof, other.ddof),
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

    def __init__(self, called: str):
        super().__init__(None)
        self.called = called  # type: ignore[misc]

    def __call__(self, layer: Layer) -> Layer:
        module = layer.module
        if layer.train and module.has_variable("batch_stats", SLOT):
            record = module.get_variable("batch_stats", SLOT)
            seen = _see(self.called, layer, record.center)
            module.put_variable("batch_stats", SLOT, record.merged(seen))
        return layer


def _see(called: str, layer: Layer, center: Array) -> Record:
    x, axis = jnp.asarray(layer.x), layer.module.axis
    reduced = _checks.reduced_axes(called, "axis", axis, x.shape)
    features = tuple(n for a, n in enumerate(x.shape) if a not in reduced)
    if features != center.shape:
        raise ValueError(
            f"{called}: the batch norm at '{layer.path}' is given features of shape {features}, "
            f"expected {center.shape}, that of its statistics. The batches are not those of this "
            "model."
        )
    x = x.astype(wide(x.dtype, center.dtype)) - jnp.expand_dims(center, reduced)
    moments, within, examples = _measure(x, reduced, as_mask(layer.mask))
    if layer.axis_name is not None:
        options: dict[str, Any] = dict(axis_index_groups=layer.axis_index_groups)
        moments = synchronize(moments, layer.axis_name, **options)
        within, examples = lax.psum((within, examples), layer.axis_name, **options)
    moments, within, examples = (
        _each(center.shape, value) for value in (moments, within, examples)
    )
    one = jnp.ones_like(within)
    return Record(center, moments, within, examples, one, one * getattr(layer.module, "ddof", 0))


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


def _each(shape: tuple[int, ...], value: Any) -> Any:
    """One number for each feature, also where all have the same."""
    if isinstance(value, Moments):
        return Moments(*(_each(shape, leaf) for leaf in value))
    return jnp.broadcast_to(jnp.asarray(value), shape)
