"""Converts batch norms of an NNX model to group norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from normjax.nnx._batch import _BatchNorm
from normjax.surgery._nnx.adopted import GroupNorm
from normjax.surgery._nnx.layers import batch_norms, become, expect_arrays
from normjax.surgery._paths import Path, path_name


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
    for layer in layers.values():
        expect_arrays(layer)
    stats = {
        path: {name: getattr(layer, name).get_value() for name in ("mean", "var")}
        for path, layer in layers.items()
    }
    groups = groups_of(stats)
    for path, layer in layers.items():
        _expect_convertible(path_name(path), layer)
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


def _expect_convertible(path: str, layer: Any) -> None:
    """Rejects layers with their own `__call__`, or with several feature axes."""
    kind = type(layer)
    if kind.__call__ not in (nnx.BatchNorm.__call__, _BatchNorm.__call__):
        raise ValueError(
            f"normjax: the {kind.__name__} at '{path}' has a __call__ of its own, which a group "
            "norm in its place would not have. Name the others: at=."
        )
    if not isinstance(layer.axis, int):
        raise ValueError(
            f"normjax: the batch norm at '{path}' has axis={layer.axis}, expected one axis of "
            "features, as group norm has. Name the others: at=."
        )
