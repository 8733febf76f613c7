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
from math import prod

import jax
import jax.numpy as jnp
from jax import Array, lax

from normjax._core.algorithms import (
    around_or_two_pass,
    merged,
    merged_products,
    merged_squares,
    squares,
    sums_around,
    two_pass,
)
from normjax._core.dtypes import abs_square, real_dtype, upcast
from normjax._core.mask import Count, safe_count, select


def measure(
    x: Array, mask: Array | None, count: Count, *, axes: tuple[int, ...], centered: bool, kept: bool
) -> tuple[Array, Array]:
    """mean and m2; `kept` if a derivative reads them again."""
    if kept and are_rows(x, axes):
        return (merged if centered else merged_squares)(x, mask, axes)
    if not centered:
        return squares(x, mask, axes)
    sample = None if _last(axes, x.ndim) else _sample(x, mask, axes)
    if sample is None:
        return two_pass(x, mask, count, axes)
    # A mean of entries that are alike is off by rounding, and so is far from no mean of them.
    floor = (8 * float(jnp.finfo(sample.dtype).eps)) ** 2 * abs_square(sample)
    sums = sums_around(x, mask, sample, axes, totals)
    return around_or_two_pass(sums, x, mask, sample, count, floor, axes)


def are_rows(x: Array, axes: tuple[int, ...]) -> bool:
    """Whether real entries that lie side by side in memory are reduced."""
    return _last(axes, x.ndim) and not jnp.iscomplexobj(x)


def _last(axes: tuple[int, ...], rank: int) -> bool:
    return axes == tuple(range(rank))[-len(axes) :]


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


def _sample(x: Array, mask: Array | None, axes: tuple[int, ...]) -> Array | None:
    """The mean of 32 entries or more, at most 1/64 of a large x, from all over x.

    Never along the first axis, whose examples may lie on several devices, nor along one that does
    so by its type. None where a sample would be all of x.
    """
    if not all(isinstance(x.shape[a], int) for a in axes):
        return None
    split = [axis is not None for axis in jax.typeof(x).sharding.spec]
    strides = dict.fromkeys((a for a in axes if a > 0 and not split[a]), 1)
    entries = prod(x.shape[a] for a in axes)
    while strides and 2 * prod(strides.values()) <= min(entries // 32, 64):
        longest = max(strides, key=lambda a: x.shape[a] // strides[a])
        strides[longest] *= 2
    if not strides or prod(strides.values()) == 1:
        return None
    step = [strides.get(a, 1) for a in range(x.ndim)]
    # From the middle of each stride, since the borders of an image are not like the rest of it.
    start = [n // 2 for n in step]
    some = lax.slice(x, start, x.shape, step)
    total = partial(jnp.sum, axis=axes, keepdims=True)
    if mask is None:
        return total(upcast(some)) / prod(some.shape[a] for a in axes)
    counts = lax.slice(jnp.broadcast_to(mask, x.shape), start, x.shape, step)
    number = total(counts, dtype=real_dtype(upcast(x).dtype))
    return total(select(upcast(some), counts)) / safe_count(number).astype(upcast(x).dtype)
