"""Batch norms of an NNX model to group norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from normjax.surgery._nnx.adopted import GroupNorm
from normjax.surgery._nnx.layers import batch_norms, become
from normjax.surgery._paths import Path


def convert(
    model: Any,
    at: tuple[str, ...] | None,
    groups_of: Callable[[Mapping[Path, Any]], Mapping[Path, int]],
    affine_of: Callable[..., Mapping[str, Any]],
    epsilon: float | None,
) -> Any:
    """`normjax.surgery.convert`, by its numbers of groups and its scale and bias."""
    copy = nnx.clone(model)
    layers = batch_norms(copy, at)
    stats = {
        path: {name: getattr(layer, name).get_value() for name in ("mean", "var")}
        for path, layer in layers.items()
    }
    groups = groups_of(stats)
    for path, layer in layers.items():
        floor = layer.epsilon if epsilon is None else epsilon
        vectors = {n: getattr(layer, n) for n in ("scale", "bias")}
        affine = {n: v.get_value() for n, v in vectors.items() if v is not None}
        new = affine_of(stats[path], affine, groups[path], floor)
        norm = GroupNorm(
            layer.num_features,
            groups[path],
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            promote_dtype=layer.promote_dtype,
            feature_axis=layer.axis,
            activation=getattr(layer, "activation", None),
            rngs=nnx.Rngs(0),
        )
        for name, value in new.items():
            metadata = vectors[name].get_metadata() if vectors[name] is not None else {}
            setattr(norm, name, nnx.Param(value, **metadata))
        become(layer, norm)
    return copy
