"""Wrappers of a layer: transform one weight, by the fields of the module."""

from __future__ import annotations

from typing import Any

from jax import Array

from normjax._functions import SpectralStats, spectral_norm, standardize_weight, weight_norm
from normjax._modules.adapter import output_dtype


def normalized(fields: Any, w: Array, scale: Any) -> Array:
    """`WeightNorm`."""
    normed = weight_norm(w, scale, feature_axis=fields.feature_axes, epsilon=fields.epsilon)
    return normed.astype(output_dtype(fields.dtype, w, scale))


def standardized(fields: Any, w: Array, gain: Any) -> Array:
    """`WeightStandardized`."""
    options: dict[str, Any] = dict(epsilon=fields.epsilon, scaled=fields.scaled)
    normed = standardize_weight(w, gain, feature_axis=fields.feature_axes, **options)
    return normed.astype(output_dtype(fields.dtype, w, gain))


def by_sigma(
    fields: Any, w: Array, stats: SpectralStats, moves: bool
) -> tuple[Array, SpectralStats]:
    """`SpectralNorm`: the weight divided by sigma, and the state of the power iteration."""
    options: dict[str, Any] = dict(n_steps=int(fields.n_steps), epsilon=fields.epsilon)
    normed, new = spectral_norm(w, stats, train=moves, **options)
    return normed.astype(output_dtype(fields.dtype, w, *stats)), new
