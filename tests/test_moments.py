"""Moments: measured, merged and shared; their derivatives in every mode."""

from functools import partial
from itertools import pairwise

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from normjax import Moments, measure, merge, synchronize
from tests import reference


def moments_of(x, axes, mask=None):
    """count, mean, m2 by the oracle."""
    r = reference.batch_norm(x, axes=axes, mask=mask)
    return r.count, r.mean, r.var * r.count


@pytest.mark.parametrize("axis", [0, -1, (0, 1), (0, 2), (-3, -2, -1)])
def test_measure_equals_the_oracle(rng, axis):
    x = rng.normal(3, 2, (4, 5, 6)).astype(np.float32)
    axes = tuple(a % 3 for a in np.atleast_1d(axis))
    got = measure(x, axis)
    count, mean, m2 = moments_of(x, axes)
    assert got.mean.shape == mean.shape == got.m2.shape
    np.testing.assert_array_equal(got.count, count.ravel()[0])
    np.testing.assert_allclose(got.mean, mean, rtol=4 * reference.EPS["float32"])
    np.testing.assert_allclose(got.m2, m2, rtol=8 * reference.EPS["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("entries", [3, 1000, 200_000])
def test_half_precision_is_measured_without_a_correction(rng, dtype, entries):
    """Constants exactly, all else within 16 eps (1 + |mean| / deviation)."""
    constants = jnp.asarray([1.1, 1234.5, 6e4, 1e-3], dtype)
    got = measure(jnp.broadcast_to(constants, (entries, 4)), 0)
    np.testing.assert_array_equal(got.mean, constants.astype(jnp.float32))
    np.testing.assert_array_equal(got.m2, 0)

    normal = rng.normal(size=(entries, 1)) + np.asarray([0, 3, 100, 1000])
    nearly = np.where(np.arange(entries)[:, None] == 0, 1.0, np.asarray(constants, np.float64))
    for data in (normal, nearly):
        x = np.asarray(jnp.asarray(data, dtype)).astype(np.float64)
        _, mean, m2 = moments_of(x, (0,))
        got, deviation = measure(jnp.asarray(x, dtype), 0), np.sqrt(m2 / entries).ravel()
        keep = deviation > 0
        unit = (1 + np.abs(mean.ravel()) / np.where(keep, deviation, 1)) * 2.0**-23
        assert np.all((np.abs(got.mean - mean.ravel()) <= 16 * unit * deviation)[keep])
        assert np.all((np.abs(got.m2 / m2.ravel() - 1) <= 16 * unit)[keep])


def test_measure_accumulates_in_float32():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        got = measure(jnp.ones((3, 2), dtype), 0)
        assert got.count.dtype == got.mean.dtype == got.m2.dtype == jnp.float32


def test_measure_keeps_float64_and_complex128(x64):
    assert measure(jnp.ones((3, 2), jnp.float64), 0).mean.dtype == jnp.float64
    got = measure(jnp.ones((3, 2), jnp.complex128), 0)
    assert got.mean.dtype == jnp.complex128
    assert got.m2.dtype == jnp.float64


def test_measure_guarantee_exact_variance(rng):
    x = rng.normal(1e6, 1, (4096, 3)).astype(np.float32)
    _, _, m2 = moments_of(x, (0,))
    unit = reference.EPS["float32"] * (1 + 1e6)
    assert np.max(np.abs(measure(x, 0).m2 / m2 - 1)) < unit


def test_measure_guarantee_masked_out_means_out(rng):
    x = rng.normal(size=(6, 3)).astype(np.float32)
    mask = np.array([True, False, True, True, False, True])[:, None]
    poisoned = np.where(mask, x, np.array([np.nan, np.inf, -np.inf], np.float32))

    def loss(x):
        m = measure(x, 0, mask)
        return jnp.sum(jnp.sin(m.mean)) + jnp.sum(m.m2)

    for derivative in (jax.jit(jax.grad(loss)), jax.jit(jax.jacfwd(loss))):
        np.testing.assert_array_equal(derivative(poisoned), derivative(x))
        assert np.all(np.asarray(derivative(x))[~mask[:, 0]] == 0)
    # Masked entries enter no arithmetic, so eager NaN checks do not raise.
    placed = jnp.asarray(poisoned)
    with jax.debug_nans(True):
        measure(placed, 0, mask)
    # Forward mode with a NaN tangent at a masked entry, as 0 * inf upstream produces it.
    direction = np.where(mask, 1, np.nan).astype(np.float32) * np.ones_like(x)
    assert np.isfinite(jax.jvp(loss, (x,), (direction,))[1])


def test_measure_guarantee_light_backward(saved_arrays):
    x = jnp.ones((8, 5, 3), jnp.bfloat16)
    kept = saved_arrays(lambda x: measure(x, (0, 1)).m2, x)
    assert [k for k in kept if k.size >= x.size] == [jax.ShapeDtypeStruct(x.shape, x.dtype)]


def test_measure_edge_no_entry():
    for got in (
        measure(jnp.ones((0, 3)), 0),
        measure(jnp.ones((2, 3)), 0, jnp.zeros((2, 1), bool)),
    ):
        assert float(got.count) == 0
        np.testing.assert_array_equal(got.mean, np.zeros(3))
        np.testing.assert_array_equal(got.m2, np.zeros(3))
        np.testing.assert_array_equal(got.variance(), np.zeros(3))


def test_count_is_exact_beyond_the_integers_of_float32():
    # A float32 sum of ones, taken one by one, would stop at 2^24.
    mask = jnp.ones((2**12 + 1, 2**12, 1), bool)
    got = jax.jit(lambda x, m: measure(x, (0, 1), m).count)(jnp.zeros((2**12 + 1, 2**12, 1)), mask)
    np.testing.assert_allclose(float(got), (2**12 + 1) * 2**12, rtol=reference.EPS["float32"])


def test_variance_biased_and_unbiased():
    m = Moments(jnp.float32(4), jnp.zeros(2), jnp.array([8.0, 12.0]))
    np.testing.assert_array_equal(m.variance(), [2, 3])
    np.testing.assert_allclose(m.variance(ddof=1), [8 / 3, 4], rtol=1e-6)
    np.testing.assert_allclose(m.variance(ddof=3.5), [16, 24], rtol=1e-6)
    for none_left in (4, 5):
        np.testing.assert_array_equal(m.variance(ddof=none_left), [0, 0])


def test_complex_variance_is_real_and_counts_both_parts(rng):
    z = (rng.normal(1, 2, (50, 3)) + 1j * rng.normal(-1, 1, (50, 3))).astype(np.complex64)
    got = measure(z, 0)
    np.testing.assert_allclose(got.mean, z.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.variance(), np.var(z, axis=0), rtol=1e-5)


def test_merge_guarantee_monoid(rng):
    parts = [measure(rng.normal(5, 2, (n, 4)).astype(np.float32), 0) for n in (3, 1, 8)]
    a, b, c = parts
    close = dict(rtol=16 * reference.EPS["float32"])
    empty = Moments(jnp.float32(0), jnp.zeros(4), jnp.zeros(4))
    orders = [merge(a, b, c), merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, b, a, empty)]
    for got in orders[1:]:
        jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, **close), got, orders[0])


def test_merge_equals_measuring_the_whole(rng):
    x = rng.normal(100, 2, (12, 4)).astype(np.float32)
    mask = rng.random((12, 4)) < 0.6
    got = merge(*(measure(x[i : i + 3], 0, mask[i : i + 3]) for i in range(0, 12, 3)))
    count, mean, m2 = moments_of(x, (0,), mask)
    np.testing.assert_array_equal(got.count, count)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.m2, m2, rtol=100 * 16 * reference.EPS["float32"])


def test_the_neutral_element_may_be_three_zeros(rng):
    measured = measure(rng.normal(size=(6, 4)).astype(np.float32), 0)
    for got in (merge(measured, Moments(0, 0, 0)), merge(Moments(0, 0, 0), measured)):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), got, measured)
        assert [leaf.shape for leaf in got] == [np.shape(leaf) for leaf in measured]


def test_merge_is_a_fold_that_scan_can_carry(rng):
    xs = rng.normal(3, 2, (5, 6, 4)).astype(np.float32)

    def add(total, x):
        return merge(total, measure(x, 0)), None

    start = Moments(jnp.float32(0), jnp.zeros(4), jnp.zeros(4))
    total, _ = jax.lax.scan(add, start, xs)
    _, mean, m2 = moments_of(xs, (0, 1))
    assert float(total.count) == 30
    np.testing.assert_allclose(total.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(total.m2, m2, rtol=1e-5)


def test_weighted_moments_merge_by_their_weights():
    got = merge(
        *(Moments(jnp.float32(w), jnp.array([m]), jnp.zeros(1)) for w, m in ((0.25, 4), (0.5, 1)))
    )
    np.testing.assert_allclose(got.mean, [2.0])


def test_merge_of_shared_and_single_counts(rng):
    x = rng.normal(size=(6, 4)).astype(np.float32)
    got = merge(measure(x[:3], 0), measure(x[3:], 0, np.ones((3, 4), bool)))
    np.testing.assert_array_equal(got.count, np.full(4, 6))
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-5, atol=1e-6)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(
    cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 2**16), share=st.floats(0, 1)
)
def test_any_cut_of_the_data_merges_to_the_same(cuts, seed, share):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(10, 1, (12, 3)).astype(np.float32), rng.random((12, 3)) < share
    edges = [0, *sorted(cuts), 12]
    pieces = [measure(x[a:b], 0, mask[a:b]) for a, b in pairwise(edges)]
    got = merge(*pieces)
    count, mean, m2 = moments_of(x, (0,), mask)
    np.testing.assert_array_equal(got.count, count)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.m2, m2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [1e3, 123450.0, 1e8, 3.3e20])
@pytest.mark.parametrize("pieces", [3, 7])
def test_pieces_of_a_constant_merge_into_that_constant(value, pieces):
    """Rounding the mean would give a variance above 0, and y = 1 for a constant."""
    piece = measure(jnp.full((49, 2), value, jnp.float32), 0)
    merged = merge(*[piece] * pieces)
    stacked = jax.tree.map(lambda v: jnp.broadcast_to(v, (pieces, *np.shape(v))), piece)
    shared = jax.vmap(lambda m: synchronize(m, "d"), axis_name="d")(stacked)
    for whole in (merged, shared):
        np.testing.assert_array_equal(whole.mean, np.full_like(whole.mean, value))
        assert not np.any(whole.m2)


def test_synchronize_guarantee_shared_exactly(rng):
    x = rng.normal(1e3, 1, (4, 6, 3)).astype(np.float32)
    mask = rng.random((4, 6, 1)) < 0.5
    mask[2] = False

    def shared(x, mask):
        return synchronize(measure(x, 0, mask), "d")

    got = jax.vmap(shared, axis_name="d")(x, mask)
    count, mean, m2 = moments_of(x.reshape(24, 3), (0,), mask.reshape(24, 1))
    np.testing.assert_array_equal(got.count[0], count[0])
    np.testing.assert_allclose(got.mean[3], mean, rtol=2 * reference.EPS["float32"])
    np.testing.assert_allclose(got.m2[0], m2, rtol=1e3 * 8 * reference.EPS["float32"])


@pytest.mark.parametrize("deviation", [2.0, 0.0])
@pytest.mark.parametrize("how", ["synchronize", "merge"])
def test_second_derivatives_of_the_pooled_m2(rng, x64, how, deviation):
    """m2 = sum w (x - mean)^2 has the Hessian 2 (diag(w) - w w^T / n), also cut in pieces.

    Also at a constant, where m2 is 0 and maximum(m2, 0) would halve its derivatives.
    """
    x, w = rng.normal(3, deviation, 24), rng.random(24) < 0.6
    pieces, mask = (4, 6), jnp.asarray(w.reshape(4, 6))

    def pooled(x):
        x = x.reshape(pieces)
        if how == "merge":
            return merge(*(measure(x[i], 0, mask[i]) for i in range(4))).m2
        shared = jax.vmap(lambda x, m: synchronize(measure(x, 0, m), "d").m2, axis_name="d")
        return shared(x, mask)[2]

    want = 2 * (np.diag(w * 1.0) - np.outer(w, w) / w.sum())
    for hessian in (jax.hessian(pooled), jax.jacrev(jax.jacrev(pooled))):
        np.testing.assert_allclose(jax.jit(hessian)(x), want, atol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.grad(pooled))(x), want @ x, atol=1e-12)


def test_every_public_name_has_one_address():
    assert normjax.move is normjax.update_stats, "the old name, kept until 1.0"
    for name in set(normjax.__all__) - {"move"}:
        assert getattr(getattr(normjax, name), "__name__", name) == name


def test_other_types_than_moments_are_refused_with_a_remedy():
    for call in (
        lambda: merge((1, 2, 3)),
        lambda: merge(measure(jnp.ones(3), 0), jnp.ones(3)),
        lambda: synchronize(jnp.ones(3), "d"),
    ):
        with pytest.raises(TypeError, match=r"moments is .*, expected Moments. .*normjax.measure"):
            call()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(256, 8, 3), (1000, 4, 2), (64, 4, 8), (64, 2, 2, 8), (2048, 2)])
def test_many_examples_of_few_positions(rng, shape, masked):
    """The sample for the pivot takes some of the positions, and there may be few."""
    x = rng.normal(30, 1, shape).astype(np.float32)
    mask = rng.random((*shape[:-1], 1)) < 0.7 if masked else None
    axes = tuple(range(len(shape) - 1))
    got = measure(jnp.asarray(x), axes, mask=mask)
    _, mean, m2 = moments_of(x, axes, mask)
    # Entries around 30, with deviations of 1.
    tolerance = 31 * reference.EPS["float32"]
    np.testing.assert_allclose(got.mean, mean.ravel(), rtol=tolerance)
    np.testing.assert_allclose(got.m2, m2.ravel(), rtol=tolerance)
