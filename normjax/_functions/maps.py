"""Maps whose derivatives are recomputed from their inputs; nothing else is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from normjax._core.dtypes import upcast
from normjax._core.linear import diagonal, rounded_sum
from normjax._core.normalize import Output, Vectors, apply, given
from normjax._core.standardize import Inputs


@jax.custom_jvp
def squashed(x: Array, slope: Array, scale: Array | None, bias: Array | None) -> Array:
    """tanh(slope x) scale + bias; vectors in the rank of x and in one dtype."""
    y = jnp.tanh(slope * x.astype(slope.dtype))
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype)


@partial(squashed.defjvp, symbolic_zeros=True)
def _squashed_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # dy = (1 - tanh^2) scale (slope dx + x d_slope) + tanh d_scale + d_bias
    x, slope, scale, _ = primals
    dtype = slope.dtype

    def steep(t: Array, x: Array, slope: Array, scale: Array | None) -> Array:
        y = jnp.tanh(slope * x.astype(dtype))
        t = t * (1 - y * y)
        return t if scale is None else t * scale

    def of_x(t: Array, x: Array, slope: Array, scale: Array | None) -> Array:
        return steep(t * slope, x, slope, scale)

    def of_slope(t: Array, x: Array, slope: Array, scale: Array | None) -> Array:
        return steep(t * x.astype(dtype), x, slope, scale)

    def of_scale(t: Array, x: Array, slope: Array, scale: Array | None) -> Array:
        return t * jnp.tanh(slope * x.astype(dtype))

    def of_bias(t: Array, *_: Any) -> Array:
        return t

    y = squashed(*primals)
    return y, _tangent(y, (of_x, of_slope, of_scale, of_bias), tangents, dtype, x, slope, scale)


@jax.custom_jvp
def thresholded(y: Array, floor: Array, inputs: Inputs, var: Array) -> Array:
    """max(y, floor) in the dtype of y; the gradient of floor is summed in the dtype of floor.

    The derivative recomputes y from `inputs` and their mean square `var`.
    """
    return jnp.maximum(y, floor.astype(y.dtype))


@partial(thresholded.defjvp, symbolic_zeros=True)
def _thresholded_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    y, floor, inputs, var = primals
    dtype = y.dtype

    def again(floor: Array, x: Array, mask: Any, *vectors: Any) -> tuple[Array, Array]:
        own = apply(x, mask, Vectors(None, *vectors), Output(dtype))
        return own, floor.astype(dtype)

    def of_y(t: Array, *kept: Any) -> Array:
        return _of_larger(t, *again(*kept))

    def of_floor(t: Array, *kept: Any) -> Array:
        return _of_larger(t, *again(*kept)[::-1])

    z = thresholded(*primals)
    x, mask, scale, bias, epsilon, *_ = inputs
    vectors = Vectors.make(x.dtype, None, var, scale, bias, epsilon)
    kept = x, mask, vectors.var, vectors.scale, vectors.bias
    return z, _tangent(z, (of_y, of_floor), tangents[:2], floor.dtype, floor, *kept)


def _of_larger(t: Array, one: Array, other: Array) -> Array:
    """The derivative of max(one, other) by `one`: half of it at a tie, as in JAX."""
    return jnp.where(one > other, t, jnp.where(one == other, t / 2, jnp.zeros_like(t)))


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


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def damped(window: Window, x: Array, alpha: Array, beta: Array, k: Array) -> Array:
    """x (k + alpha mean)^-beta, with the mean of the squares in the window.

    alpha, beta and k have the rank of x, and the dtype in which its squares are summed.
    """
    base = k + alpha / window.size * window.total(upcast(x) ** 2)
    return (upcast(x) * base**-beta).astype(x.dtype)


@partial(damped.defjvp, symbolic_zeros=True)
def _damped_jvp(window: Window, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # dy = base^-beta (dx - x (beta d_base / base + log(base) d_beta))
    x, alpha, *_ = primals
    dx, d_alpha, d_beta, d_k = map(given, tangents)

    def mean(x: Array) -> Array:
        return window.total(upcast(x) ** 2) / window.size

    def of_x(t: Array, x: Array, alpha: Array, beta: Array, k: Array) -> Array:
        return t * (k + alpha * mean(x)) ** -beta

    def of_base(t: Array, x: Array, alpha: Array, beta: Array, k: Array) -> Array:
        return -beta * t * upcast(x) * (k + alpha * mean(x)) ** (-beta - 1)

    def of_alpha(t: Array, x: Array, *rest: Array) -> Array:
        return of_base(t * mean(x), x, *rest)

    def of_beta(t: Array, x: Array, alpha: Array, beta: Array, k: Array) -> Array:
        base = k + alpha * mean(x)
        return -t * upcast(x) * jnp.log(base) * base**-beta

    d_base = dx
    if dx is not None:
        # Upcast once for both terms, whose cotangents are then added before they are rounded.
        dx = upcast(dx)
        doubled = diagonal(lambda t, x: 2 * t * upcast(x), dx, x)
        d_base = window.total(doubled) * (alpha / window.size)
    y = damped(window, *primals)
    maps = of_x, of_base, of_alpha, of_beta, of_base
    return y, _tangent(y, maps, (dx, d_base, d_alpha, d_beta, d_k), alpha.dtype, *primals)


def _tangent(
    y: Array, maps: tuple[Callable[..., Array], ...], tangents: Any, dtype: np.dtype, *kept: Any
) -> Array:
    """The sum of `map(t, *kept)` over the tangents that are not zero."""
    terms = [
        diagonal(one, t.astype(dtype), *kept, shape=y.shape)
        for one, t in zip(maps, map(given, tangents), strict=True)
        if t is not None
    ]
    return rounded_sum(y.shape, y.dtype, *terms, others=(y,))
