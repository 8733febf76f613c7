"""A CPU where no kernel may be called, as where XLA partitions: the formulas as they are written.

XLA's CPU compiler writes to memory what two sums share; barriers that kept it from that ended at
twice the memory traffic of the floor. Speed comes from kernels (`kernels`).
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

    Chan, Golub, LeVeque (1983), (1.7). What the first sum has lost by rounding, the sum of the
    deviations brings back: constants are exact. Along columns it is taken beside the squares, so
    that devices which share exchange both at once.
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
    # Beyond the range of the dtype it is infinite, and not the difference of two infinities.
    return rough + rest, jnp.where(jnp.isfinite(squares), m2, squares)


def totals(arrays: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
    """Of each its sum over `axes`, which stay with size 1."""
    return [jnp.sum(x, axes, keepdims=True) for x in arrays]
