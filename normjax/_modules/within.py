"""Norms within an example: a call of a module in terms of the functions."""

from __future__ import annotations

from typing import Any

from jax import Array

from normjax import _errors, _functions
from normjax._modules.shell import Call, Shell, operands


def layer_norm(shell: Shell, call: Call) -> Array:
    """`LayerNorm`."""
    (x, scale, bias), options = operands(shell, call, shell.fields.feature_axes)
    return _functions.layer_norm(x, scale, bias, **_axes(shell), **options)


def rms_norm(shell: Shell, call: Call) -> Array:
    """`RMSNorm`."""
    (x, scale, _), options = operands(shell, call, shell.fields.feature_axes)
    return _functions.rms_norm(x, scale, **_axes(shell), **options)


def add_layer_norm(shell: Shell, call: Call, residual: Any) -> tuple[Array, Array]:
    """`AddLayerNorm`."""
    (x, scale, bias), options = operands(shell, call, shell.fields.feature_axes)
    return _functions.add_layer_norm(x, residual, scale, bias, **_axes(shell), **options)


def add_rms_norm(shell: Shell, call: Call, residual: Any) -> tuple[Array, Array]:
    """`AddRMSNorm`."""
    (x, scale, _), options = operands(shell, call, shell.fields.feature_axes)
    return _functions.add_rms_norm(x, residual, scale, **_axes(shell), **options)


def group_norm(shell: Shell, call: Call, groups: dict[str, Any]) -> Array:
    """`GroupNorm`; `groups` says how many there are, or how large they are."""
    fields, x = shell.fields, _errors.inexact("x", call.x)
    _errors.group_axes(fields.reduction_axes, fields.feature_axis, x.shape)
    _errors.axis("feature_axis", fields.feature_axis, x.shape)
    (x, scale, bias), options = operands(shell, call._replace(x=x), fields.feature_axis)
    return _functions.group_norm(
        x,
        scale,
        bias,
        **groups,
        feature_axis=fields.feature_axis,
        axis=fields.reduction_axes,
        **options,
    )


def instance_norm(shell: Shell, call: Call) -> Array:
    """`InstanceNorm`."""
    axes = shell.fields.feature_axes
    vectors, options = operands(shell, call, axes)
    return _functions.instance_norm(*vectors, feature_axis=axes, **options)


def filter_response_norm(shell: Shell, call: Call) -> Array:
    """`FilterResponseNorm`."""
    fields = shell.fields
    vectors, options = operands(shell, call, fields.feature_axes)
    threshold = None
    if fields.use_threshold:
        features = _errors.features(vectors[0].shape, fields.feature_axes)
        threshold = shell.held("threshold", features)
    return _functions.filter_response_norm(
        *vectors, threshold, feature_axis=fields.feature_axes, **options
    )


def dynamic_tanh(shell: Shell, call: Call) -> Array:
    """`DynamicTanh`."""
    axes, x = shell.fields.feature_axes, _errors.inexact("x", call.x)
    alpha = shell.held("alpha")
    scale, bias = shell.affine(_errors.features(x.shape, axes), call)
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


def _axes(shell: Shell) -> dict[str, Any]:
    return {"axis": shell.fields.reduction_axes, "feature_axis": shell.fields.feature_axes}
