"""A CPU where no kernel may be called, for example where XLA partitions: plain formulas.

XLA's CPU compiler writes the common operand of two sums to memory. With barriers against that, the
memory traffic was still twice the minimum. Speed comes from kernels (`kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from normjax._core import algorithms
from normjax._core.dtypes import abs_square, upcast
from normjax._core.mask import Count, deviation, safe_count, select


def measure(
    x: Array, mask: Array | None, count: Count, *, axes: tuple[int, ...], centered: bool, kept: bool
) -> tuple[Array, Array]:
    """mean and m2 by the corrected two-pass algorithm.

    Chan, Golub, LeVeque (1983), (1.7). The sum of the deviations corrects the rounding error of the
    first sum, so constants are exact. Along columns it is computed together with the squares, so
    that devices reduce both at once.
    """
    if not centered:
        return algorithms.squares(x, mask, axes)
    if algorithms.are_last(axes, x.ndim):
        return algorithms.two_pass(x, mask, count, axes)
    x, divisor = upcast(x), safe_count(count)
    (total,) = totals([select(x, mask)], axes)
    rough = total / divisor.astype(x.dtype)
    d = deviation(x, rough, mask)
    first, squares = totals([d, abs_square(d)], axes)
    rest = first / divisor.astype(x.dtype)
    m2 = jnp.maximum(squares - abs_square(rest) * divisor, 0)
    # On overflow it is infinite, and not the difference of two infinities.
    return rough + rest, jnp.where(jnp.isfinite(squares), m2, squares)


def totals(arrays: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
    """The sum of each array over `axes`, kept with size 1."""
    return [jnp.sum(x, axes, keepdims=True) for x in arrays]
