"""Exact algorithms for the mean and the sum of squared deviations; each platform uses some.

All return (mean, m2) with the reduced axes kept at size 1. Entries whose mask is False do not
count. The choice of a platform depends on the cost of a pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

from normjax._core.dtypes import abs_square, real_dtype, upcast
from normjax._core.mask import Count, deviation, safe_count, select

Totals = Callable[[Sequence[Array], tuple[int, ...]], Sequence[Array]]


def measure(
    x: Array, mask: Array | None, count: Count, axes: tuple[int, ...], centered: bool,
    totals: Totals,
) -> tuple[Array, Array]:  # fmt: skip
    """Rows in two passes, in cache; columns in one pass, around the mean of a sample.

    `totals` is the function of the platform.
    """
    if not centered:
        return squares(x, mask, axes)
    pivot = None if are_last(axes, x.ndim) else sample(x, mask, axes)
    if pivot is None:
        return two_pass(x, mask, count, axes)
    # The mean of nearly equal entries has a rounding error. With this floor, a pivot that is off by
    # such an error is not considered far from the mean.
    floor = (8 * float(jnp.finfo(pivot.dtype).eps)) ** 2 * abs_square(pivot)
    sums = sums_around(x, mask, pivot, axes, totals)
    return around_or_two_pass(sums, x, mask, pivot, count, floor, axes)


def are_last(axes: tuple[int, ...], rank: int) -> bool:
    """Whether the reduced axes are the last ones, so that their entries are contiguous."""
    return axes == tuple(range(rank))[-len(axes) :]


def squares(x: Array, mask: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Around zero: mean 0 and the sum of squares."""
    m2 = jnp.sum(abs_square(select(upcast(x), mask)), axes, keepdims=True)
    return jnp.zeros_like(m2, upcast(x).dtype), m2


def two_pass(
    x: Array, mask: Array | None, count: Count, axes: tuple[int, ...]
) -> tuple[Array, Array]:
    """The mean, corrected by the mean deviation from it, and the squares around it.

    Chan, Golub, LeVeque (1983), (1.7). Each sum needs the previous one. For rows, a GPU runs all
    sums and the normalization in one kernel, which reads x once.
    """
    x, divisor = upcast(x), safe_count(count)

    def total(values: Array) -> Array:
        return jnp.sum(values, axes, keepdims=True)

    mean = total(select(x, mask)) / divisor.astype(x.dtype)
    mean = mean + total(deviation(x, mean, mask)) / divisor.astype(x.dtype)
    return mean, total(abs_square(deviation(x, mean, mask)))


def merged_squares(x: Array, mask: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """`squares` of a real x, squared inside the reduction."""
    x = select(upcast(x), mask)
    zero = np.zeros((), x.dtype)

    def merge(a: Any, b: Any) -> Any:
        # The operands are (entry, 0) or (0, sum).
        first, second = (v[1] + v[0] * v[0] for v in (a, b))
        total, lost = _add(first, second)
        return jnp.zeros_like(total), total, a[2] + b[2] + lost

    nothing = jnp.zeros_like(x)
    _, m2, lost = lax.reduce((x, nothing, nothing), (zero,) * 3, merge, axes)
    m2 = jnp.expand_dims(_compensated(m2, lost), axes)
    return jnp.zeros_like(m2), m2


def merged(x: Array, mask: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """One pass: the reduction merges moments.

    Chan, Golub, LeVeque (1983), the pairwise merge; an entry has count 1 and m2 0. For real x.
    """
    x = select(upcast(x), mask)
    count = jnp.ones_like(x) if mask is None else jnp.broadcast_to(mask, x.shape)
    # NumPy constants: JAX reports a reducer that closes over a tracer as a leak.
    zero, one = np.zeros((), x.dtype), np.ones((), x.dtype)

    def merge(a: Any, b: Any) -> Any:
        count = a[0] + b[0]
        share = b[0] / jnp.maximum(count, one)
        distance = (b[1] - a[1]) + (b[2] - a[2])
        mean, mean_rest = _add(a[1], distance * share)
        weight = a[0] * share
        # The squared distance to an empty piece may overflow.
        between = jnp.where(weight > 0, weight * distance * distance, zero)
        m2, m2_rest = _add(a[3], b[3] + between)
        return count, mean, a[2] + mean_rest, m2, a[4] + b[4] + m2_rest

    nothing = jnp.zeros_like(x)
    entries = count.astype(x.dtype), x, nothing, nothing, nothing
    _, mean, mean_rest, m2, m2_rest = lax.reduce(entries, (zero,) * 5, merge, axes)
    m2 = jnp.expand_dims(_compensated(m2, m2_rest), axes)
    return jnp.expand_dims(mean + mean_rest, axes), m2


def merged_products(t: Array, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """mean(x), sum(t) and sum(t (x - mean(x))), in one pass by the same merge. For real x."""
    zero, one = np.zeros((), x.dtype), np.ones((), x.dtype)

    def merge(a: Any, b: Any) -> Any:
        count = a[0] + b[0]
        distance = ((b[1] - a[1]) + (b[2] - a[2])) / jnp.maximum(count, one)
        mean, mean_rest = _add(a[1], distance * b[0])
        # Around the new mean: the products of each piece are around its own mean.
        moved = b[4] + (b[3] * (distance * a[0]) - a[3] * (distance * b[0]))
        products = a[4] + moved
        # Knuth's TwoSum, since products may be of any sign and size.
        back = products - a[4]
        lost = (a[4] - (products - back)) + (moved - back)
        return count, mean, a[2] + mean_rest, a[3] + b[3], products, a[5] + b[5] + lost

    nothing = jnp.zeros_like(x)
    entries = jnp.ones_like(x), x, nothing, t, nothing, nothing
    _, mean, rest, total, products, lost = (
        jnp.expand_dims(v, axes) for v in lax.reduce(entries, (zero,) * 6, merge, axes)
    )
    return mean + rest, total, _compensated(products, lost)


def _add(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum and its rounding error (Dekker's Fast2Sum).

    Without compensation the rounding errors of n sums would accumulate.
    """
    total = a + b
    return total, b - (total - a)


def _compensated(total: Array, lost: Array) -> Array:
    # The rounding error of an overflow is NaN.
    return jnp.where(jnp.isfinite(total), total + lost, total)


def sums_around(
    x: Array, mask: Array | None, pivot: Array | None, axes: tuple[int, ...],
    totals: Totals,
) -> tuple[Array, Array]:  # fmt: skip
    """sum(x - pivot) and sum(|x - pivot|^2) in one pass; without a pivot around zero.

    `totals` is the function of the platform.
    """
    d = deviation(upcast(x), pivot, mask)
    first, second = totals((d, abs_square(d)), axes)
    return first, second


def moved(first: Array, second: Array, pivot: ArrayLike, count: Count) -> tuple[Array, Array]:
    """mean and m2 from sums around a pivot."""
    entries = safe_count(count)
    shift = first / entries.astype(first.dtype)
    m2 = jnp.maximum(second - abs_square(shift) * entries, 0)
    # The mean of no entries is 0.
    return shift + pivot * (count > 0).astype(shift.dtype), m2


def unless_far(
    near: tuple[Array, Array], pivot: ArrayLike, count: Count, floor: ArrayLike,
    again: Callable[..., Any], operands: tuple[Any, ...],
) -> tuple[Array, Array]:  # fmt: skip
    """mean and m2 from sums around a pivot if they are exact for all features, else `again`."""
    exact = around_pivot_is_exact(*near, pivot, count, floor)
    return _conditional(again)(exact, near, operands)


def around_or_two_pass(
    sums: tuple[Array, Array], x: Array, mask: Array | None, pivot: Array, count: Count,
    floor: ArrayLike, axes: tuple[int, ...],
) -> tuple[Array, Array]:  # fmt: skip
    """mean and m2 from sums around a pivot if exact for all features, else by two passes over x."""
    near, again = moved(*sums, pivot, count), partial(two_pass, axes=axes)
    return unless_far(near, pivot, count, floor, again, (x, mask, count))


def _conditional(function: Callable[..., Any]) -> Callable[..., Any]:
    """(true, values, operands) -> values if true, else function(*operands).

    Under vmap both are computed, as by lax.cond, whose own batching rule cannot determine the
    sharding of the selection on a mesh of explicit axes.
    """

    @custom_vmap
    def chosen(true: Array, values: Any, operands: Any) -> Any:
        return lax.cond(true, lambda: values, lambda: function(*operands))

    @chosen.def_vmap
    def _(size: int, batched: Any, true: Array, values: Any, operands: Any) -> Any:
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        if any(jax.tree.leaves(batched[2])):
            others = jax.vmap(function, axes[2])(*operands)
        else:
            others = jax.tree.map(lambda v: v[None], function(*operands))
        true = jnp.atleast_1d(true)
        values = jax.tree.map(lambda v, b: v if b else v[None], values, batched[1])

        def select(value: Array, other: Array) -> Array:
            # Adding zeros gives all operands one sharding.
            here = true.reshape(-1, *(1,) * (value.ndim - 1)).astype(value.real.dtype)
            nil = jnp.zeros_like(value) + jnp.zeros_like(other) + jnp.zeros_like(here)
            return jnp.where(here + nil.real > 0, value + nil, other + nil)

        return jax.tree.map(select, values, others), jax.tree.map(lambda _: True, values)

    return chosen


def around_pivot_is_exact(
    mean: Array, m2: Array, pivot: ArrayLike, count: Count, floor: ArrayLike
) -> Array:
    """Whether sums around the pivot are as exact as those around the mean: one boolean for all.

    Their error in the variance is a few eps (mean - pivot)^2; `floor` is added to the variance
    before it is used as a divisor. Within the bound, errors stay below 16 eps (var + floor); at
    twice the bound they reach 30 (tests/test_forms.py). False also if anything is not finite.
    """
    var = m2 / safe_count(count)
    near = abs_square(mean - pivot) <= 2 * (var + floor)
    return jnp.all(near & jnp.isfinite(m2))


def sample(x: Array, mask: Array | None, axes: tuple[int, ...]) -> Array | None:
    """The mean of a strided sample of x: 32 entries or more, about 1/64 of a large x.

    There is no stride along the first axis, whose examples may be on several devices, nor along an
    axis that is sharded by its type. None if the sample would be all of x.
    """
    if not all(isinstance(x.shape[a], int) for a in axes):
        return None
    split = [axis is not None for axis in jax.typeof(x).sharding.spec]
    strides = dict.fromkeys((a for a in axes if a > 0 and not split[a]), 1)
    entries = prod(x.shape[a] for a in axes)
    while strides and 2 * prod(strides.values()) <= min(entries // 32, 64):
        longest = max(strides, key=lambda a: x.shape[a] // strides[a])
        if 2 * strides[longest] > x.shape[longest]:
            break
        strides[longest] *= 2
    if not strides or prod(strides.values()) == 1:
        return None
    step = [strides.get(a, 1) for a in range(x.ndim)]
    # From the middle of each stride, since the borders of an image differ from the rest.
    start = [n // 2 for n in step]
    some = lax.slice(x, start, x.shape, step)
    total = partial(jnp.sum, axis=axes, keepdims=True)
    if mask is None:
        return total(upcast(some)) / prod(some.shape[a] for a in axes)
    counts = lax.slice(jnp.broadcast_to(mask, x.shape), start, x.shape, step)
    number = total(counts, dtype=real_dtype(upcast(x).dtype))
    return total(select(upcast(some), counts)) / safe_count(number).astype(upcast(x).dtype)
