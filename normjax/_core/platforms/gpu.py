"""A GPU: rows in one kernel, columns in one pass around a sample of x.

A norm is limited by the memory that its kernels read and write. In units of x (H100, float32):
layer norm reads and writes 2 in evaluation, in one kernel; by E[x^2] - E[x]^2 it is 3. The kernel
has one result, so the moments that a derivative reads are taken in the backward pass, beside its
sums, by merges, which need no mean beforehand: a training step takes 7, and 8 with Flax's. Along
columns, as in group norm, a merge would write its operands (5 to 13), and two passes take 4; around
a pivot that is a mean of some of the entries it is 3.02.
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
    """Whether real entries that lie side by side in memory are reduced."""
    return algorithms.are_last(axes, x.ndim) and not jnp.iscomplexobj(x)


def sums_of_rows(t: Array, u: Array, x: Array, center: Array, axes: tuple[int, ...]) -> list[Array]:
    """sum(t) and sum(u (x - center)), by sums that need no center.

    They and the moments that a derivative reads are then taken in one pass over x.
    """
    mean, total, products = merged_products(u, x.astype(u.dtype), axes)
    return [jnp.sum(t, axes, keepdims=True), products + total * (mean - center)]


def totals(arrays: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
    """Of each its sum over `axes`, which stay with size 1; of two real ones in one complex sum.

    XLA's compiler fuses one sum into the operation that makes what is summed. Two it fuses with
    each other instead, and writes to memory what they share: x - pivot in float32, which costs 5
    and not 1 (bfloat16, (8, 32, 32, 320)), or the cotangent behind an activation.
    """
    total = partial(jnp.sum, axis=axes, keepdims=True)
    if len(arrays) != 2 or any(map(jnp.iscomplexobj, arrays)):
        return [total(x) for x in arrays]
    both = total(lax.complex(*arrays))
    return [both.real, both.imag]
