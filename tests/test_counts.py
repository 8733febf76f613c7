"""Counts beyond 32-bit integers, of masks that are never allocated.

The compiler turns the sum over a broadcast axis of a mask into a product.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from tests.reference import EPS


def count_of(shape, mask, repeated):
    """The count of a mask broadcast to `repeated`, for an x of `shape` that is not allocated."""

    def count(mask):
        x = jnp.zeros(shape, jnp.bfloat16)
        return normjax.measure(x, (0, 1, 2), jnp.broadcast_to(mask, repeated)).count

    return np.asarray(jax.jit(count)(mask), np.float64)


@pytest.mark.parametrize(
    "shape",
    [(2**18, 2**3, 2**12, 3), (2**13, 2**20, 1, 3)],
    ids=str,
)
def test_a_masked_count_does_not_wrap(rng, shape):
    """The mask has that many entries, or is broadcast to them by `measure`."""
    mask = rng.random((1, 1, shape[2], 3)) < [0.9, 1.0, 0.5]
    mask[0, 0, 0] = True
    exact = mask.sum((0, 1, 2)).astype(np.float64) * shape[0] * shape[1]
    assert exact.max() > 2**32
    for repeated in (shape, (1, shape[1], shape[2], 3), (1, *mask.shape[1:])):
        got = count_of(shape, mask, repeated)
        np.testing.assert_allclose(got, exact, rtol=EPS["float32"])


def test_a_count_that_float32_holds_is_exact():
    mask = np.arange(2**12).reshape(1, 1, -1, 1) < [1, 2**11 + 1, 2**12 - 1]
    got = count_of((2**14, 2**8, 2**12, 3), mask, (2**14, 2**8, 2**12, 3))
    np.testing.assert_array_equal(got, 2.0**22 * np.array([1, 2**11 + 1, 2**12 - 1]))
