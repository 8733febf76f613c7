"""Norms within an example: a call of a module in terms of the functions."""

from __future__ import annotations

from typing import Any

from jax import Array

from normjax import _errors, _functions
from normjax._modules.adapter import Adapter, Call, operands


def layer_norm(adapter: Adapter, call: Call) -> Array:
    """`LayerNorm`."""
    (x, scale, bias), options = operands(adapter, call, adapter.fields.feature_axes)
    return _functions.layer_norm(x, scale, bias, **_axes(adapter), **options)


def rms_norm(adapter: Adapter, call: Call) -> Array:
    """`RMSNorm`."""
    (x, scale, _), options = operands(adapter, call, adapter.fields.feature_axes)
    return _functions.rms_norm(x, scale, **_axes(adapter), **options)


def add_layer_norm(adapter: Adapter, call: Call, residual: Any) -> tuple[Array, Array]:
    """`AddLayerNorm`."""
    (x, scale, bias), options = operands(adapter, call, adapter.fields.feature_axes)
    return _functions.add_layer_norm(x, residual, scale, bias, **_axes(adapter), **options)


def add_rms_norm(adapter: Adapter, call: Call, residual: Any) -> tuple[Array, Array]:
    """`AddRMSNorm`."""
    (x, scale, _), options = operands(adapter, call, adapter.fields.feature_axes)
    return _functions.add_rms_norm(x, residual, scale, **_axes(adapter), **options)


def group_norm(adapter: Adapter, call: Call, groups: dict[str, Any]) -> Array:
    """`GroupNorm`; `groups` has the number of groups or their size."""
    fields, x = adapter.fields, _errors.inexact("x", call.x)
    _errors.group_axes(fields.reduction_axes, fields.feature_axis, x.shape)
    _errors.axis("feature_axis", fields.feature_axis, x.shape)
    (x, scale, bias), options = operands(adapter, call._replace(x=x), fields.feature_axis)
    return _functions.group_norm(
        x,
        scale,
        bias,
        **groups,
        feature_axis=fields.feature_axis,
        axis=fields.reduction_axes,
        **options,
    )


def instance_norm(adapter: Adapter, call: Call) -> Array:
    """`InstanceNorm`."""
    axes = adapter.fields.feature_axes
    vectors, options = operands(adapter, call, axes)
    return _functions.instance_norm(*vectors, feature_axis=axes, **options)


def filter_response_norm(adapter: Adapter, call: Call) -> Array:
    """`FilterResponseNorm`."""
    fields = adapter.fields
    vectors, options = operands(adapter, call, fields.feature_axes)
    threshold = None
    if fields.use_threshold:
        features = _errors.features(vectors[0].shape, fields.feature_axes)
        threshold = adapter.held("threshold", features)
    return _functions.filter_response_norm(
        *vectors, threshold, feature_axis=fields.feature_axes, **options
    )


def dynamic_tanh(adapter: Adapter, call: Call) -> Array:
    """`DynamicTanh`."""
    axes, x = adapter.fields.feature_axes, _errors.inexact("x", call.x)
    alpha = adapter.held("alpha")
    scale, bias = adapter.affine(_errors.features(x.shape, axes), call)
    return _functions.dynamic_tanh(x, alpha, scale, bias, feature_axis=axes)


def local_response_norm(fields: Any, x: Any) -> Array:
    """`LocalResponseNorm`, which has no parameters."""
    return _functions.local_response_norm(
        x,
        size=fields.size,
        alpha=fields.alpha,
        beta=fields.beta,
        k=fields.k,
        feature_axis=fields.feature_axis,
    )


def _axes(adapter: Adapter) -> dict[str, Any]:
    return {"axis": adapter.fields.reduction_axes, "feature_axis": adapter.fields.feature_axes}
