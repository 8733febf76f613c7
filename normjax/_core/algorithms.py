"""Exact ways to take a mean and a sum of squared deviations, for platforms to choose from.

All return (mean, m2) with the reduced axes kept at size 1, of x as it is given or 0 where the mask
is False. A platform chooses by what a pass over memory costs there.
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
    """Rows by two passes, while they lie in cache; columns in one, around a mean of a few entries.

    `totals` are those of the platform.
    """
    if not centered:
        return squares(x, mask, axes)
    pivot = None if are_last(axes, x.ndim) else sample(x, mask, axes)
    if pivot is None:
        return two_pass(x, mask, count, axes)
    # A mean of entries that are alike is off by rounding, and so is far from no mean of them.
    floor = (8 * float(jnp.finfo(pivot.dtype).eps)) ** 2 * abs_square(pivot)
    sums = sums_around(x, mask, pivot, axes, totals)
    return around_or_two_pass(sums, x, mask, pivot, count, floor, axes)


def are_last(axes: tuple[int, ...], rank: int) -> bool:
    """Whether what is reduced lies side by side in memory."""
    return axes == tuple(range(rank))[-len(axes) :]


def squares(x: Array, mask: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Around zero: mean 0 and the sum of squares."""
    m2 = jnp.sum(abs_square(select(upcast(x), mask)), axes, keepdims=True)
    return jnp.zeros_like(m2, upcast(x).dtype), m2


def two_pass(
    x: Array, mask: Array | None, count: Count, axes: tuple[int, ...]
) -> tuple[Array, Array]:
    """The mean, corrected by the mean deviation from it, and the squares around that.

    Chan, Golub, LeVeque (1983), (1.7). Each sum needs the one before it: where x lies in rows, a
    GPU runs them and the normalization as one kernel, which reads x once.
    """
    x, divisor = upcast(x), safe_count(count)

    def total(values: Array) -> Array:
        return jnp.sum(values, axes, keepdims=True)

    mean = total(select(x, mask)) / divisor.astype(x.dtype)
    mean = mean + total(deviation(x, mean, mask)) / divisor.astype(x.dtype)
    return mean, total(abs_square(deviation(x, mean, mask)))


def merged_squares(x: Array, mask: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """`squares` of a real x that the reduction itself squares."""
    x = select(upcast(x), mask)
    zero = np.zeros((), x.dtype)

    def merge(a: Any, b: Any) -> Any:
        # Of an entry the sum is 0, and of a sum the entry.
        first, second = (v[1] + v[0] * v[0] for v in (a, b))
        total, lost = _add(first, second)
        return jnp.zeros_like(total), total, a[2] + b[2] + lost

    nothing = jnp.zeros_like(x)
    _, m2, lost = lax.reduce((x, nothing, nothing), (zero,) * 3, merge, axes)
    m2 = jnp.expand_dims(_mended(m2, lost), axes)
    return jnp.zeros_like(m2), m2


def merged(x: Array, mask: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """One pass: moments are a monoid, and their merge is the operation of the reduction.

    Chan, Golub, LeVeque (1983), the pairwise merge; an entry has count 1 and m2 0. For real x.
    """
    x = select(upcast(x), mask)
    count = jnp.ones_like(x) if mask is None else jnp.broadcast_to(mask, x.shape)
    # Not of x within: JAX takes a reducer that holds a tracer for a leak.
    zero, one = np.zeros((), x.dtype), np.ones((), x.dtype)

    def merge(a: Any, b: Any) -> Any:
        count = a[0] + b[0]
        share = b[0] / jnp.maximum(count, one)
        distance = (b[1] - a[1]) + (b[2] - a[2])
        mean, mean_rest = _add(a[1], distance * share)
        weight = a[0] * share
        # The square of the distance to nothing may overflow.
        between = jnp.where(weight > 0, weight * distance * distance, zero)
        m2, m2_rest = _add(a[3], b[3] + between)
        return count, mean, a[2] + mean_rest, m2, a[4] + b[4] + m2_rest

    nothing = jnp.zeros_like(x)
    entries = count.astype(x.dtype), x, nothing, nothing, nothing
    _, mean, mean_rest, m2, m2_rest = lax.reduce(entries, (zero,) * 5, merge, axes)
    return jnp.expand_dims(mean + mean_rest, axes), jnp.expand_dims(_mended(m2, m2_rest), axes)


def merged_products(t: Array, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """mean(x), sum(t) and sum(t (x - mean(x))), in one pass by the same merge. For real x."""
    zero, one = np.zeros((), x.dtype), np.ones((), x.dtype)

    def merge(a: Any, b: Any) -> Any:
        count = a[0] + b[0]
        distance = ((b[1] - a[1]) + (b[2] - a[2])) / jnp.maximum(count, one)
        mean, mean_rest = _add(a[1], distance * b[0])
        # Around the new mean, which is not that around which each piece was summed.
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
    return mean + rest, total, _mended(products, lost)


def _add(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum, and what rounding it has lost (Dekker's Fast2Sum).

    One after the other, the roundings of n sums would add up to many of them.
    """
    total = a + b
    return total, b - (total - a)


def _mended(total: Array, lost: Array) -> Array:
    # What an overflow has lost is no number.
    return jnp.where(jnp.isfinite(total), total + lost, total)


def sums_around(
    x: Array, mask: Array | None, pivot: Array | None, axes: tuple[int, ...],
    totals: Totals,
) -> tuple[Array, Array]:  # fmt: skip
    """sum(x - pivot) and sum(|x - pivot|^2) in one pass; without a pivot around zero.

    `totals` are those of the platform.
    """
    d = deviation(upcast(x), pivot, mask)
    first, second = totals((d, abs_square(d)), axes)
    return first, second


def moved(first: Array, second: Array, pivot: ArrayLike, count: Count) -> tuple[Array, Array]:
    """mean and m2 of the sums around a pivot."""
    entries = safe_count(count)
    shift = first / entries.astype(first.dtype)
    m2 = jnp.maximum(second - abs_square(shift) * entries, 0)
    # The mean of nothing is 0.
    return shift + pivot * (count > 0).astype(shift.dtype), m2


def unless_far(
    near: tuple[Array, Array], pivot: ArrayLike, count: Count, floor: ArrayLike,
    again: Callable[..., Any], operands: tuple[Any, ...],
) -> tuple[Array, Array]:  # fmt: skip
    """mean and m2 by sums around a pivot if they are exact for all features, else `again`."""
    exact = around_pivot_is_exact(*near, pivot, count, floor)
    return _conditional(again)(exact, near, operands)


def around_or_two_pass(
    sums: tuple[Array, Array], x: Array, mask: Array | None, pivot: Array, count: Count,
    floor: ArrayLike, axes: tuple[int, ...],
) -> tuple[Array, Array]:  # fmt: skip
    """Of sums around a pivot where they are exact for all features, else by two passes over x."""
    near, again = moved(*sums, pivot, count), partial(two_pass, axes=axes)
    return unless_far(near, pivot, count, floor, again, (x, mask, count))


def _conditional(function: Callable[..., Any]) -> Callable[..., Any]:
    """(true, values, operands) -> values if true, else function(*operands).

    Under vmap both are computed, as those of lax.cond, whose own rule does not know how the
    selection between them lies on a mesh of explicit axes.
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
            # Zeros bring all to where each of them lies.
            here = true.reshape(-1, *(1,) * (value.ndim - 1)).astype(value.real.dtype)
            nil = jnp.zeros_like(value) + jnp.zeros_like(other) + jnp.zeros_like(here)
            return jnp.where(here + nil.real > 0, value + nil, other + nil)

        return jax.tree.map(select, values, others), jax.tree.map(lambda _: True, values)

    return chosen


def around_pivot_is_exact(
    mean: Array, m2: Array, pivot: ArrayLike, count: Count, floor: ArrayLike
) -> Array:
    """Whether sums around the pivot are as exact as those around the mean: one boolean for all.

    They lose a few eps (mean - pivot)^2 of the variance, to which `floor` is added before anything
    is divided by it. Within the bound their errors stay below 16 eps (var + floor); at twice the
    bound they reach 30 (tests/test_forms.py). False as well where anything is not finite.
    """
    var = m2 / safe_count(count)
    near = abs_square(mean - pivot) <= 2 * (var + floor)
    return jnp.all(near & jnp.isfinite(m2))


def sample(x: Array, mask: Array | None, axes: tuple[int, ...]) -> Array | None:
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
