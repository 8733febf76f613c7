"""Masks: which entries count, how many, and the values that replace the others."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array

from normjax._core.dtypes import accumulation_dtype, real_dtype

Count: TypeAlias = Array | np.ndarray | np.floating


def counted(x: Array, mask: Array | None, axes: tuple[int, ...]) -> Count:
    """How many entries of x count over `axes`, in the rank of x where there is a mask.

    Real, of the accumulation dtype; exact where that holds the number, else rounded.
    """
    dtype = real_dtype(accumulation_dtype(x.dtype))
    if mask is None:
        # A NumPy constant: summing it over devices then costs no communication.
        return product_of_sizes([x.shape[a] for a in axes], dtype)
    repeats = product_of_sizes([x.shape[a] for a in axes if mask.shape[a] == 1], dtype)
    return _ones(mask, axes, dtype) * repeats


def safe_count(count: Count) -> Count:
    """The count as a divisor: 1 in place of 0. A constant stays a constant."""
    where = np.where if isinstance(count, np.generic) else jnp.where
    return where(count > 0, count, np.ones((), count.dtype)).astype(count.dtype)


def product_of_sizes(sizes: list[int], dtype: np.dtype) -> Count:
    """The product of `sizes`: a constant, or a scalar where one of them is symbolic."""
    entries = prod(sizes)
    return dtype.type(entries) if isinstance(entries, int) else jnp.asarray(entries, dtype)


def _ones(mask: Array, axes: tuple[int, ...], dtype: np.dtype) -> Array:
    """How often a mask is True over `axes`."""
    # Counted in integers, since a float32 running sum of ones stops growing at 2^24.
    total = partial(jnp.sum, dtype=jnp.uint32, keepdims=True)
    sizes = [mask.shape[a] for a in axes]
    known = all(isinstance(size, int) for size in sizes)
    if known and prod(sizes) < 2**32:
        return total(mask, axes).astype(dtype)
    # A 32-bit integer would overflow: the longest axis is summed first, then the lower 12 bits and
    # the higher bits of these sums separately.
    first, *rest = sorted(axes, key=mask.shape.__getitem__, reverse=True) if known else axes
    below = total(mask, first)
    above = jnp.zeros_like(below)
    for axis in rest:
        below, above = total(below & 0xFFF, axis), total(above + (below >> 12), axis)
    above, below = above + (below >> 12), below & 0xFFF
    return above.astype(dtype) * 2**12 + below.astype(dtype)


def select(x: Array, mask: Array | None) -> Array:
    """x for sums: 0 where the mask is False, by selection, since 0 * NaN would still be NaN."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))


def deviation(x: Array, center: Array | None, mask: Array | None = None) -> Array:
    """x - center, and 0 where the mask is False; x itself without a center."""
    if center is None:
        return select(x, mask)
    return (x if mask is None else jnp.where(mask, x, center)) - center


def select_finite(values: Array, x: Array, mask: Array | None) -> Array:
    """values for the output: 0 where x is masked and not finite, all others unchanged."""
    if mask is None:
        return values
    return jnp.where(mask | jnp.isfinite(x), values, jnp.zeros((), values.dtype))
