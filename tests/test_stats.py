"""Running statistics: one step, and many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from normjax import BatchStats, Moments, _stats, measure, merge, update_stats
from tests import reference
from tests.reference import EPS


def batch(mean, var, count=10.0):
    mean, var = jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32)
    return Moments(jnp.float32(count), mean, var * count)


def moved(stats, moments, momentum=0.9, debias=False, ddof=0):
    return update_stats(stats, moments, momentum=momentum, debias=debias, ddof=ddof)


def test_make_returns_the_initial_statistics_of_flax():
    stats = BatchStats.make((3, 2))
    np.testing.assert_array_equal(stats.mean, np.zeros((3, 2)))
    np.testing.assert_array_equal(stats.var, np.ones((3, 2)))
    assert stats.count is None
    counted = BatchStats.make(3, jnp.complex64, counted=True)
    assert counted.mean.dtype == jnp.complex64
    assert counted.var.dtype == jnp.float32
    assert counted.count.dtype == jnp.int32


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("ddof", [0, 1])
def test_exponential_average(momentum, ddof):
    stats = moved(BatchStats.make(2), batch([1, 2], [3, 4]), momentum, ddof=ddof)
    correction = 10 / (10 - ddof)
    want_mean = reference.running(np.zeros(2), np.array([1, 2]), momentum)
    want_var = reference.running(np.ones(2), np.array([3, 4]) * correction, momentum)
    np.testing.assert_allclose(stats.mean, want_mean, rtol=4 * EPS["float32"])
    np.testing.assert_allclose(stats.var, want_var, rtol=4 * EPS["float32"])


def test_cumulative_average_is_the_plain_mean_of_all_batches(rng):
    means, variances = rng.normal(size=(20, 3)), rng.random((20, 3))
    stats = BatchStats.make(3, counted=True)
    for m, v in zip(means, variances, strict=True):
        stats = moved(stats, batch(m, v), momentum=None)
    np.testing.assert_allclose(stats.mean, means.mean(0), atol=20 * EPS["float32"])
    np.testing.assert_allclose(stats.var, variances.mean(0), rtol=20 * EPS["float32"])
    np.testing.assert_array_equal(stats.count, np.full(3, 20))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.99999])
def test_debiased_average(rng, momentum):
    means, variances = rng.normal(size=(6, 3)), rng.random((6, 3)) * 1e-6
    stats = BatchStats.make(3, counted=True)
    for k in range(6):
        stats = moved(stats, batch(means[k], variances[k]), momentum, debias=True)
        want = reference.debiased(list(means[: k + 1]), momentum)
        np.testing.assert_allclose(stats.mean, want, atol=8 * EPS["float32"])
        # The variances are far below 1, so that a remainder of the initial 1 would be visible.
        want = reference.debiased(list(variances[: k + 1]), momentum)
        np.testing.assert_allclose(stats.var, want, rtol=16 * EPS["float32"])


def test_update_stats_guarantee_pieces_are_a_whole(rng):
    x = rng.normal(3, 1, (12, 2)).astype(np.float32)
    moments = merge(*(measure(piece, 0) for piece in np.split(x, [1, 6])))
    stats = update_stats(BatchStats.make(2), moments, momentum=0.9)
    want = reference.batch_norm(x, axes=(0,))
    np.testing.assert_allclose(stats.mean, 0.1 * want.mean, rtol=8 * EPS["float32"])
    np.testing.assert_allclose(stats.var, 0.9 + 0.1 * want.var, rtol=8 * EPS["float32"])


def test_update_stats_has_the_defaults_of_batch_norm(rng):
    stats = update_stats(BatchStats.make(2), batch([1, 2], [3, 4]))
    np.testing.assert_allclose(stats.mean, [0.01, 0.02], rtol=4 * EPS["float32"])
    np.testing.assert_allclose(stats.var, [1.02, 1.03], rtol=4 * EPS["float32"])


def test_update_stats_edge_momentum_0():
    poisoned = BatchStats(jnp.array([jnp.nan]), jnp.array([jnp.inf]))
    jax.tree.map(
        np.testing.assert_array_equal,
        update_stats(poisoned, batch([2], [3]), momentum=0.0),
        BatchStats(np.array([2.0]), np.array([3.0])),
    )


def test_update_stats_ignores_moments_of_zero_elements():
    start = BatchStats(jnp.array([5.0, 6.0]), jnp.array([7.0, 8.0]))
    jax.tree.map(np.testing.assert_array_equal, update_stats(start, Moments.make(2)), start)
    made = Moments.make((2, 3), jnp.complex64)
    assert [leaf.dtype for leaf in made] == [jnp.float32, jnp.complex64, jnp.float32]
    assert {leaf.shape for leaf in made} == {(2, 3)}
    assert Moments.make(2, jnp.bfloat16).mean.dtype == jnp.float32


@pytest.mark.parametrize(
    ("error", "stats", "moments", "options", "message"),
    [
        (TypeError, dict(mean=0), Moments.make(2), {}, "stats is dict, expected BatchStats"),
        (TypeError, BatchStats.make(2), (1, 2, 3), {}, r"moments is tuple.* normjax.measure\("),
        (
            ValueError,
            BatchStats.make(2),
            Moments.make(3),
            {},
            r"moments.mean has shape \(3,\), expected \(2,\), that of stats.mean. Measure over",
        ),
        (ValueError, BatchStats.make(2), Moments.make(2), dict(momentum=1.5), "momentum=1.5"),
        (ValueError, BatchStats.make(2), Moments.make(2), dict(ddof=-1), "ddof=-1, expected"),
        (ValueError, BatchStats.make(2), Moments.make(2), dict(debias=True), "needs stats.count"),
    ],
)
def test_update_stats_error_messages(error, stats, moments, options, message):
    with pytest.raises(error, match=f"normjax.update_stats: .*{message}"):
        update_stats(stats, moments, **options)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("where", ["mean", "m2"])
def test_update_stats_guarantee_statistics_stay_finite(poison, where):
    start = BatchStats.make(3, counted=True)
    moments = batch([1, 2, 3], [1, 1, 1])
    moments = moments._replace(**{where: getattr(moments, where).at[1].set(poison)})
    got, clean = moved(start, moments), moved(start, batch([1, 2, 3], [1, 1, 1]))
    for leaf, old, new in zip(got, start, clean, strict=True):
        np.testing.assert_array_equal(leaf[1], old[1])
        np.testing.assert_array_equal(leaf[::2], new[::2])


def test_promise_5_nothing_valid_moves_nothing():
    start = BatchStats(jnp.array([5.0]), jnp.array([7.0]), jnp.array([3.0]))
    for momentum, debias in ((0.9, False), (None, False), (0.9, True), (0.0, False)):
        got = moved(start, batch([0], [0], count=0), momentum, debias)
        jax.tree.map(np.testing.assert_array_equal, got, start)


def test_update_stats_edge_no_degree_of_freedom():
    start = BatchStats.make(1)
    jax.tree.map(np.testing.assert_array_equal, moved(start, batch([9], [0], 1), ddof=1), start)
    assert float(moved(start, batch([9], [0], 1), ddof=0).mean[0]) > 0


def test_update_stats_guarantee_no_gradient():
    def after(mean):
        stats = moved(BatchStats(mean, jnp.ones(2)), batch([1, 2], [1, 1])._replace(mean=mean))
        return jnp.sum(stats.mean) + jnp.sum(stats.var)

    np.testing.assert_array_equal(jax.grad(after)(jnp.ones(2)), np.zeros(2))


def test_statistics_take_the_wider_dtype(x64):
    in_float64 = Moments(jnp.float64(4), jnp.ones(2, jnp.float64), jnp.ones(2, jnp.float64))
    assert moved(BatchStats.make(2), in_float64).var.dtype == jnp.float64
    half = BatchStats(jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16))
    assert moved(half, batch([1, 2], [1, 1])).mean.dtype == jnp.float32


def test_statistics_and_count_are_never_half_precision():
    stats = BatchStats.make(2, jnp.bfloat16, counted=True)
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    half = BatchStats(*(leaf.astype(jnp.bfloat16) for leaf in stats))
    assert {leaf.dtype for leaf in moved(half, batch([1, 2], [1, 1]))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("options", [dict(momentum=0.0), dict(momentum=None), dict(debias=True)])
def test_old_values_of_weight_zero_are_discarded(options):
    poisoned = BatchStats(jnp.array([jnp.nan]), jnp.array([jnp.inf]), jnp.zeros(1))
    stats = moved(poisoned, batch([2], [3]), **options)
    np.testing.assert_array_equal(stats.mean, [2])
    np.testing.assert_array_equal(stats.var, [3])


def test_momentum_may_be_traced():
    step = jax.jit(lambda m: moved(BatchStats.make(1, counted=True), batch([1], [1]), m).mean)
    np.testing.assert_allclose(step(0.75), [0.25], rtol=1e-6)
    debiased = jax.jit(
        lambda m: moved(BatchStats.make(1, counted=True), batch([1], [1]), m, debias=True).mean
    )
    np.testing.assert_array_equal(debiased(0.75), [1])


def test_count_increases_with_a_plain_momentum():
    stats = moved(BatchStats.make(1, counted=True), batch([1], [1]))
    np.testing.assert_array_equal(stats.count, [1])


@pytest.mark.parametrize("options", [dict(momentum=None), dict(debias=True), dict()])
def test_update_stats_edge_a_count_at_the_end_of_its_dtype(options):
    """A float32 count would stop at 2^24. An int32 count stays at its maximum, 2^31 - 1."""
    counts = jnp.array([2**24, 2**24 + 1, 2**31 - 2, 2**31 - 1], jnp.int32)
    start = BatchStats(jnp.zeros(4), jnp.ones(4), counts)
    stats = moved(start, batch([1] * 4, [1] * 4), **options)
    np.testing.assert_array_equal(stats.count, [2**24 + 1, 2**24 + 2, 2**31 - 1, 2**31 - 1])
    if options == dict(momentum=None):
        weight = 1 / (np.asarray(counts, np.float64) + 1)
        np.testing.assert_allclose(stats.mean, weight, rtol=4 * EPS["float32"])


def test_a_floating_point_count_keeps_its_dtype():
    """Such as that of an old checkpoint, or of states averaged over devices."""
    for dtype in (jnp.float32, jnp.int32):
        start = BatchStats(jnp.zeros(1), jnp.ones(1), jnp.ones(1, dtype))

        def body(stats, mean, dtype=dtype):
            x = mean + jnp.array([[1.0], [3.0]])
            return normjax.batch_norm(x, stats, train=True, momentum=None)[1], None

        stats, _ = jax.lax.scan(body, start, jnp.array([0.0, 3.0]))
        assert stats.count.dtype == dtype
        np.testing.assert_array_equal(stats.count, [3])
        np.testing.assert_allclose(stats.mean, [(0 + 2 + 5) / 3], rtol=1e-6)
    each = jax.tree.map(lambda v: jnp.stack([v, v]), stats)
    average = jax.vmap(lambda s: jax.lax.pmean(s, "d"), axis_name="d")(each)
    again = moved(BatchStats(*(leaf[0] for leaf in average)), batch([1], [1]), momentum=None)
    np.testing.assert_array_equal(again.count, [4])


def test_a_count_of_a_wrong_shape_or_dtype_is_an_error():
    x, stats = jnp.ones((4, 3)), BatchStats.make(3, counted=True)
    with pytest.raises(ValueError, match=r"stats.count has shape \(2,\), expected \(3,\)"):
        normjax.batch_norm(x, stats._replace(count=jnp.zeros(2, jnp.int32)), train=True)
    with pytest.raises(TypeError, match=r"stats.count has dtype bool"):
        normjax.batch_norm(x, stats._replace(count=jnp.zeros(3, bool)), train=True)


def test_a_schedule_of_momentum_in_python_is_compiled_once():
    stats, moments = BatchStats.make(2, counted=True), batch([1, 2], [3, 4])
    for debias in (False, True):
        moved(stats, moments, 0.5, debias)
        known = _stats._next._cache_size()
        for momentum in (0.6, 0.7, 0.8):
            moved(stats, moments, momentum, debias)
        assert _stats._next._cache_size() == known
    moved(stats, moments, None)
    assert _stats._next._cache_size() > known
