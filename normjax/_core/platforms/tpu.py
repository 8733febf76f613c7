"""A TPU: the reduction itself merges moments, in one pass, as fast as the unstable formula.

Cycles of XLA's cost model (v5e), layer norm of (8192, 4096) float32: 1.22M, the same as for
E[x^2] - E[x]^2; two passes take 2.24M. Sums around a pivot that is known before x also fuse into
the convolution that makes x; a merge does not. Two bottleneck blocks take 4.85M cycles with such
sums, 5.95M with merges.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from normjax._core.algorithms import merged, squares, two_pass
from normjax._core.mask import Count


def measure(
    x: Array, mask: Array | None, count: Count, *, axes: tuple[int, ...], centered: bool, kept: bool
) -> tuple[Array, Array]:
    """mean and m2; `kept` if a derivative reads them again."""
    if not centered:
        return squares(x, mask, axes)
    return two_pass(x, mask, count, axes) if jnp.iscomplexobj(x) else merged(x, mask, axes)


def totals(arrays: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
    """The sum of each array over `axes`, kept with size 1."""
    return [jnp.sum(x, axes, keepdims=True) for x in arrays]
