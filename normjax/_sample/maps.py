"""Maps whose derivative is computed anew from their input, which is all that is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from normjax._moments import widened
from normjax._normalize import normalize
from normjax._walks import diagonal, rounded_sum


@jax.custom_jvp
def squashed(x: Array, slope: Array, scale: Array | None, bias: Array | None) -> Array:
    """tanh(slope x) scale + bias; vectors in the rank of x and in one dtype."""
    y = jnp.tanh(slope * x.astype(slope.dtype))
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype)


@partial(squashed.defjvp, symbolic_zeros=True)
def _squashed_jvp(primals, tangents):
    # dy = (1 - tanh^2) scale (slope dx + x d_slope) + tanh d_scale + d_bias
    x, slope, scale, _ = primals
    dtype = slope.dtype

    def steep(t, x, slope, scale):
        y = jnp.tanh(slope * x.astype(dtype))
        t = t * (1 - y * y)
        return t if scale is None else t * scale

    def of_x(t, x, slope, scale):
        return steep(t * slope, x, slope, scale)

    def of_slope(t, x, slope, scale):
        return steep(t * x.astype(dtype), x, slope, scale)

    def of_scale(t, x, slope, scale):
        return t * jnp.tanh(slope * x.astype(dtype))

    def of_bias(t, *_):
        return t

    y = squashed(*primals)
    return y, _tangent(y, (of_x, of_slope, of_scale, of_bias), tangents, dtype, x, slope, scale)


@jax.custom_jvp
def thresholded(y: Array, floor: Array, *origin: Any) -> Array:
    """max(y, floor); `origin` is what y was normalized from, and is anew in the derivative."""
    return jnp.maximum(y, floor)


@partial(thresholded.defjvp, symbolic_zeros=True)
def _thresholded_jvp(primals, tangents):
    y, floor, *origin = primals
    dtype = y.dtype

    def again(x, mask, var, scale, bias):
        return normalize(x, None, var, scale, bias, epsilon=0.0, mask=mask, dtype=dtype)

    def of_y(t, floor, *origin):
        return jax.jvp(lambda y: jnp.maximum(y, floor), (again(*origin),), (t,))[1]

    def of_floor(t, floor, *origin):
        y, floor = again(*origin), jnp.broadcast_to(floor, t.shape)
        return jax.jvp(lambda floor: jnp.maximum(y, floor), (floor,), (t,))[1]

    z = thresholded(*primals)
    return z, _tangent(z, (of_y, of_floor), tangents[:2], dtype, floor, *origin)


class Window(NamedTuple):
    """Neighboring features, `axis` counted from the last."""

    size: int
    axis: int

    def total(self, values: Array) -> Array:
        """The sum of the values of a window around each feature."""
        shape, padding = [1] * values.ndim, [(0, 0)] * values.ndim
        shape[self.axis], padding[self.axis] = self.size, (self.size // 2, (self.size - 1) // 2)
        zero = np.zeros((), values.dtype)
        return lax.reduce_window(values, zero, lax.add, shape, [1] * values.ndim, padding)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def damped(window: Window, alpha: float, beta: float, k: float, x: Array) -> Array:
    """x (k + alpha mean)^-beta, with the mean of the squares in the window."""
    values = widened(x)
    base = k + alpha / window.size * window.total(values**2)
    return (values * base**-beta).astype(x.dtype)


@damped.defjvp
def _damped_jvp(window, alpha, beta, k, primals, tangents):
    # dy = base^-beta dx - beta x base^(-beta - 1) d_base
    ((x,), (dx,)), weight = (primals, tangents), alpha / window.size

    def base(x):
        return k + weight * window.total(widened(x) ** 2)

    def of_x(t, x):
        return t * base(x) ** -beta

    def of_base(t, x):
        return -beta * t * widened(x) * base(x) ** (-beta - 1)

    def squared(t, x):
        return 2 * weight * t * widened(x)

    y, dx = damped(window, alpha, beta, k, x), widened(dx)
    d_base = window.total(diagonal(squared, dx, x))
    return y, _tangent(y, (of_x, of_base), (dx, d_base), dx.dtype, x)


def _tangent(
    y: Array, maps: tuple[Callable[..., Array], ...], tangents: Any, dtype: np.dtype, *kept: Any
) -> Array:
    """The sum of `map(t, *kept)` over the tangents that are not zero."""
    terms = [
        diagonal(one, t.astype(dtype), *kept, shape=y.shape)
        for one, t in zip(maps, tangents, strict=True)
        if not (t is None or isinstance(t, SymbolicZero))
    ]
    return rounded_sum(y.shape, y.dtype, *terms)
