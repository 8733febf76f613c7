"""A GPU: rows in one kernel, columns in one pass around the mean of a sample of x.

The memory that its kernels read and write limits a norm. In units of x (H100, float32), layer norm
in evaluation takes 2, in one kernel; E[x^2] - E[x]^2 takes 3. This kernel has one result, so the
moments that a derivative reads are computed in the backward pass, together with its sums, by
merges, which do not need the mean first. A training step takes 7; that of Flax takes 8. Along
columns, as in group norm, a merge would write its operands (5 to 13), and two passes take 4; one
pass around the mean of a sample takes 3.02.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from normjax._core import algorithms
from normjax._core.algorithms import merged, merged_products, merged_squares
from normjax._core.mask import Count


def measure(
    x: Array, mask: Array | None, count: Count, *, axes: tuple[int, ...], centered: bool, kept: bool
) -> tuple[Array, Array]:
    """mean and m2; `kept` if a derivative reads them again."""
    if kept and are_rows(x, axes):
        return (merged if centered else merged_squares)(x, mask, axes)
    return algorithms.measure(x, mask, count, axes, centered, totals)


def are_rows(x: Array, axes: tuple[int, ...]) -> bool:
    """Whether the reduced entries are real and contiguous in memory."""
    return algorithms.are_last(axes, x.ndim) and not jnp.iscomplexobj(x)


def sums_of_rows(t: Array, u: Array, x: Array, center: Array, axes: tuple[int, ...]) -> list[Array]:
    """sum(t) and sum(u (x - center)), by sums that need no center.

    So these sums and the moments that a derivative reads take one pass over x.
    """
    mean, total, products = merged_products(u, x.astype(u.dtype), axes)
    return [jnp.sum(t, axes, keepdims=True), products + total * (mean - center)]


def totals(arrays: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
    """The sum of each array over `axes`, kept with size 1; one complex sum for two real ones.

    XLA fuses one sum into the operation that makes its operand. It fuses two sums with each other
    instead, and writes their common operand to memory: x - pivot in float32, which costs 5 instead
    of 1 (bfloat16, (8, 32, 32, 320)), or the cotangent that an activation passes back.
    """
    total = partial(jnp.sum, axis=axes, keepdims=True)
    if len(arrays) != 2 or any(map(jnp.iscomplexobj, arrays)):
        return [total(x) for x in arrays]
    both = total(lax.complex(*arrays))
    return [both.real, both.imag]
