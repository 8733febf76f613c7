"""The oracle: NumPy float64 from the textbook formulas. Imports no JAX and nothing of normjax.

Functions are written with plain squares, so that for real data they continue analytically and
`complex_step` differentiates them to the last digit (Squire, Trapp 1998).
"""

from typing import NamedTuple

import numpy as np

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


class Normed(NamedTuple):
    """Output, biased statistics, and gradients for one cotangent of the output."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray


def standardized(x, scale, bias, dy, *, axes, mask=None, epsilon=1e-5, centered=True) -> Normed:
    """(x - mean) / sqrt(var + epsilon) * scale + bias and its gradients, rank kept everywhere.

    Ioffe & Szegedy 2015, Algorithm 1 and the gradients below it, over any axes, with a mask:
    statistics are those of the entries whose mask is True; every entry is normalized by them.
    Not centered, the mean is taken as 0 and var is the mean square (Zhang & Sennrich 2019).
    """
    x = np.asarray(x)
    x = x.astype(np.result_type(x.dtype, np.float64))
    scale, bias, dy = (np.asarray(v).astype(np.float64) for v in (scale, bias, dy))
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    given = valid | np.isfinite(x)
    x = np.where(given, x, 0)

    n = valid.sum(axes, keepdims=True)
    safe_n = np.maximum(n, 1)
    mean = np.where(valid, x, 0).sum(axes, keepdims=True) / safe_n * centered
    deviation = x - mean
    var = np.where(valid, deviation * deviation, 0).sum(axes, keepdims=True) / safe_n
    inv = (var + epsilon) ** -0.5
    xhat = deviation * inv

    dxhat = dy * scale
    dvar = (dxhat * deviation).sum(axes, keepdims=True) * -0.5 * inv**3
    dmean = (-dxhat * inv).sum(axes, keepdims=True) * centered
    through = np.where(valid, dvar * 2 * deviation / safe_n + dmean / safe_n, 0)
    return Normed(
        xhat * scale + bias,
        mean,
        var,
        n,
        np.where(given, dxhat * inv + through, 0),
        unbroadcast(dy * xhat, scale.shape),
        unbroadcast(dy, bias.shape),
    )


def unbroadcast(gradient, shape):
    """Sums over the axes along which an array of `shape` was repeated."""
    lead = gradient.ndim - len(shape)
    gradient = gradient.sum(tuple(range(lead)))
    repeated = tuple(a for a, n in enumerate(shape) if n == 1 != gradient.shape[a])
    return gradient.sum(repeated, keepdims=True)


def batch_norm(x, scale=1.0, bias=0.0, dy=None, *, axes, mask=None, epsilon=1e-5) -> Normed:
    """`standardized` with one value for each feature in scale, bias and statistics."""
    x = np.asarray(x)
    features = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    scale, bias = (np.expand_dims(np.broadcast_to(v, features), axes) for v in (scale, bias))
    dy = np.ones(x.shape) if dy is None else dy
    r = standardized(x, scale, bias, dy, axes=axes, mask=mask, epsilon=epsilon)
    mean, var, count = (v.squeeze(axes) for v in (r.mean, r.var, r.count))
    return Normed(r.y, mean, var, count, r.dx, r.dscale.squeeze(axes), r.dbias.squeeze(axes))


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
    """The exponential average started from zero, divided by its total weight (Kingma, Ba)."""
    k = len(batches)
    weights = [momentum ** (k - 1 - i) for i in range(k)]
    return sum(w * b for w, b in zip(weights, batches, strict=True)) / sum(weights)


def condition(mean, var, epsilon):
    """1 + |m| / s, to which the error of a backward stable computation is proportional."""
    return 1 + np.abs(mean) / np.sqrt(var + epsilon)
