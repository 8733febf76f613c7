"""The oracle: NumPy float64 from the textbook formulas. Imports no JAX and nothing of normjax.

Functions are written with plain squares, so that for real data they continue analytically and
`complex_step` differentiates them to the last digit (Squire, Trapp 1998).
"""

from typing import NamedTuple

import numpy as np

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


class BatchNorm(NamedTuple):
    """Output, biased batch statistics, and gradients for one cotangent of the output."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray


def features_last(v, axes, ndim):
    """A per-feature vector with the reduced axes put back as size 1."""
    return np.expand_dims(np.asarray(v), axes) if np.ndim(v) else np.reshape(v, (1,) * ndim)


def batch_norm(x, scale=1.0, bias=0.0, dy=None, *, axes, mask=None, epsilon=1e-5) -> BatchNorm:
    """Ioffe & Szegedy 2015, Algorithm 1 and the gradients below it, with a mask.

    Statistics are those of the entries whose mask is True; every entry is normalized by them.
    """
    x = np.asarray(x)
    x = x.astype(np.result_type(x.dtype, np.float64))
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    given = valid | np.isfinite(x)
    x = np.where(given, x, 0)
    scale = features_last(scale, axes, x.ndim)
    bias = features_last(bias, axes, x.ndim)

    n = valid.sum(axes, keepdims=True)
    safe_n = np.maximum(n, 1)
    mean = np.where(valid, x, 0).sum(axes, keepdims=True) / safe_n
    deviation = x - mean
    var = np.where(valid, deviation * deviation, 0).sum(axes, keepdims=True) / safe_n
    inv = (var + epsilon) ** -0.5
    xhat = deviation * inv
    y = xhat * scale + bias

    dy = np.ones(x.shape) if dy is None else np.asarray(dy).astype(np.float64)
    dxhat = dy * scale
    dvar = (dxhat * deviation).sum(axes, keepdims=True) * -0.5 * inv**3
    dmean = (-dxhat * inv).sum(axes, keepdims=True)
    dx = dxhat * inv + np.where(valid, dvar * 2 * deviation / safe_n + dmean / safe_n, 0)
    return BatchNorm(
        y,
        mean.squeeze(axes),
        var.squeeze(axes),
        np.broadcast_to(n, mean.shape).squeeze(axes),
        np.where(given, dx, 0),
        (dy * xhat).sum(axes),
        dy.sum(axes),
    )


def complex_step(function, x, direction):
    """The directional derivative of `function`, without cancellation."""
    h = 1e-30
    return np.imag(function(np.asarray(x) + 1j * h * np.asarray(direction))) / h


def running(old, batch, momentum, steps=1):
    """k steps of the exponential average on one batch."""
    for _ in range(steps):
        old = momentum * old + (1 - momentum) * batch
    return old


def debiased(batches, momentum):
    """The exponential average started from nothing, divided by its total weight (Kingma, Ba)."""
    k = len(batches)
    weights = [momentum ** (k - 1 - i) for i in range(k)]
    return sum(w * b for w, b in zip(weights, batches, strict=True)) / sum(weights)


def condition(mean, var, epsilon):
    """1 + |m| / s, what the error of a backward stable computation grows with."""
    return 1 + np.abs(mean) / np.sqrt(var + epsilon)
