"""Every platform's form of mean and variance, run on this CPU with the same error bound.

Errors of y, of the variance and of the gradient of x are at most 16 units of eps (1 + |mean| / s),
s = sqrt(var + epsilon), against the oracle in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import normjax
from normjax import BatchStats
from normjax._core import algorithms
from normjax._core.lowering import CPU, KERNELS, PLATFORMS, VARIABLE
from normjax._core.platforms import kernels
from tests import hard, reference
from tests.reference import EPS
from tests.transformations import mesh

BOUND, EPSILON, DEVICES = 16, 1e-5, 4

# Long reductions are slow, so only those inputs with the largest errors there.
LONG = {
    256: tuple(hard.inputs(256)),
    4096: (
        "comb of zeros, N(100000, 1)",
        "outlier first",
        "heavy tails",
        "scale 1e+15",
        "one half far away",
        "dead channels, offset",
    ),
    200_000: ("N(10, 1)", "outlier first", "one half far away"),
}


@pytest.fixture(scope="module")
def form(request):
    """The form that programs are lowered in."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == KERNELS:
            patch.delenv(VARIABLE, raising=False)
        else:
            patch.setenv(VARIABLE, request.param)
        jax.clear_caches()
        yield request.param
        jax.clear_caches()


FORMS = PLATFORMS if kernels.plugin() is None else (*PLATFORMS, KERNELS)
every_form = pytest.mark.parametrize("form", FORMS, indirect=True)


@every_form
def test_the_form_is_the_requested_one(form):
    stats = BatchStats.make(2)
    step = jax.jit(lambda x: normjax.batch_norm(x, stats, train=True)[0])
    conditionals = step.lower(jnp.ones((4, 2))).as_text().count("stablehlo.case")
    assert conditionals == (0 if form in CPU else 1)
    columns = jax.jit(normjax.instance_norm).lower(jnp.ones((1, 256, 2))).as_text()
    assert columns.count("stablehlo.case") == (1 if form == "gpu" else 0)


@every_form
@pytest.mark.parametrize("case", hard.CASES)
@pytest.mark.parametrize("n", LONG)
def test_errors_are_within_the_bound(form, case, n):
    """Every norm, and every kind of running mean, on every input."""
    errors = hard.errors_of_case(case, n, LONG[n])
    beyond = {name: units for name, units in errors if not max(units) <= BOUND}
    assert not beyond, beyond


def measured(norm, x, mask, pivot):
    """Errors in units of a norm on x with EPSILON, and its results."""
    dy = hard.cotangent(len(x))
    how = dict(norm=norm, epsilon=EPSILON)
    got, want = hard.run(x, dy, pivot, mask, **how), hard.oracle(x, dy, mask, **how)
    return hard.units(got, want, dy, EPSILON), got


CONSTANTS = np.array([[0.1, 1e6 / 7], [3.0, 0.0], [1e3 / 3, -7e-20], [1e15, 1e-3]])


@every_form
def test_constants_become_the_bias(form):
    """Exactly, except for a running mean that is near the constant but not equal to it.

    The sums around such a mean are rounded: y is the bias up to 16 units, which are 2e-6 for a
    constant of 0. The exact second pass runs from a distance of sqrt(2 epsilon) on.
    """
    root = np.float32(np.sqrt(EPSILON))
    for constants in np.repeat(CONSTANTS, 2, axis=1).astype(np.float32):
        x = np.broadcast_to(constants, (255, hard.FEATURES))
        for norm in ("batch", "layer", "instance", "group"):
            units, got = measured(norm, x, None, None)
            np.testing.assert_array_equal(got.y, 0)
            assert max(units) <= BOUND
        for pivot in (constants, constants + 3 * root, 0 * constants):
            _, got = measured("batch", x, None, pivot)
            np.testing.assert_array_equal(got.y, 0)
            np.testing.assert_array_equal(got.var, 0)
        for off in (0.5, 1.41):
            units, got = measured("batch", x, None, constants + np.float32(off) * root)
            assert max(units) <= BOUND
            if form == "cpu":
                np.testing.assert_array_equal(got.y, 0)


@every_form
def test_a_dead_channel_stays_at_the_bias_while_its_running_mean_decays(form):
    x = np.zeros((1024, 2), np.float32)

    def step(stats, _):
        y, stats = normjax.batch_norm(x, stats, train=True, momentum=0.9)
        return stats, jnp.max(jnp.abs(y))

    start = BatchStats(jnp.array([1.0, -30.0]), jnp.ones(2))
    stats, off = jax.lax.scan(step, start, None, 300)
    assert np.max(off) <= BOUND * EPS["float32"]
    assert np.max(np.abs(stats.mean)) < 1e-11


def sampled(n):
    """The rows of x that are sampled on a GPU, from the gradient of the mean of the sample."""
    x = jnp.zeros((1, n, hard.FEATURES))
    rows = jax.grad(lambda x: jnp.sum(algorithms.sample(x, None, (1,))))(x)[0, :, 0] != 0
    rows = np.asarray(rows)
    assert 32 <= rows.sum() <= n / 2
    return rows


@every_form
@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("n", [256, 1024])
def test_a_sample_of_outliers(rng, form, norm, n):
    """Sums around its mean would lose the digits of the other entries; x is measured again."""
    rows = sampled(n)[:, None]
    normal = rng.normal(size=(n, hard.FEATURES))
    for offset in (0, 1e4):
        # Outliers in all features of the sampled rows, and in half of the features.
        for far in (rows, rows & (np.arange(hard.FEATURES) % 2 == 0)):
            for size in (30, 1e4, 1e8):
                x = np.where(far, size, 1) * normal + offset + np.where(far, size, 0)
                units, _ = measured(norm, x.astype(np.float32), None, None)
                assert max(units) <= BOUND, (offset, size)


@every_form
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_a_sample_without_a_valid_entry(rng, form, norm):
    n = 256
    mask = np.broadcast_to(~sampled(n)[:, None], (n, hard.FEATURES))
    x = np.where(mask, rng.normal(1e4, 1, (n, hard.FEATURES)), np.nan).astype(np.float32)
    units, _ = measured(norm, x, mask, None)
    assert max(units) <= BOUND


def masks(rng, n):
    """Some entries, one, none or all are valid, by feature; groups have them in different order."""
    some, one = rng.random(n) < 0.6, np.arange(n) == n // 3
    none, every = np.zeros(n, bool), np.ones(n, bool)
    for columns in ((some, one, none, every), (one, none, every, none), (none, none, one, some)):
        yield np.stack(columns, -1)


PIVOTED = [
    *(("batch", name) for names in hard.KINDS.values() for name in names if name != "1e18"),
    *((name, "none") for name in hard.NORMS if name != "batch"),
]


@every_form
@pytest.mark.parametrize(("norm", "pivot"), PIVOTED)
def test_masks_and_masked_values(rng, form, norm, pivot):
    """Also for one valid entry, for none, and where NaN is masked."""
    n = 256
    for offset in (0, 1e4):
        for mask in masks(rng, n):
            x = rng.normal(offset, 1, (n, hard.FEATURES)).astype(np.float32)
            for value in (x, np.where(mask, x, np.float32(np.nan))):
                want = hard.oracle(value, x, mask, norm=norm, epsilon=EPSILON)
                center = hard.PIVOTS[pivot](want.mean[0], np.sqrt(want.var[0] + EPSILON))
                center = None if center is None else np.float32(center)
                units, _ = measured(norm, value, mask, center)
                assert max(units) <= BOUND, offset


@every_form
@pytest.mark.parametrize(("norm", "pivot"), PIVOTED)
def test_a_nan_that_counts_stays_in_its_feature(rng, form, norm, pivot):
    n, feature = 256, 1
    x = rng.normal(3, 2, (n, hard.FEATURES)).astype(np.float32)
    hit = np.isin(np.arange(hard.FEATURES), (0, 1) if norm == "group" else feature)
    center = hard.PIVOTS[pivot](x.mean(0), x.std(0))
    center = None if center is None else np.float32(center)
    clean, dy = x.copy(), hard.cotangent(n)
    x[n // 2, feature] = np.nan
    how = dict(norm=norm, epsilon=EPSILON)
    got, want = hard.run(x, dy, center, None, **how), hard.oracle(clean, dy, None, **how)
    assert np.isnan(np.asarray(got.y)[:, hit]).all()
    y, dx = (np.where(hit, w, g) for g, w in ((got.y, want.y), (got.dx, want.dx)))
    others = hard.Normed(y, None, dx)
    assert max(hard.units(others, want, dy, EPSILON)) <= BOUND


@every_form
@pytest.mark.parametrize(("norm", "pivot"), PIVOTED)
def test_bfloat16(rng, form, norm, pivot):
    """Statistics have the bound of float32; y and dx have one rounding to bfloat16 in addition."""
    n, half = 256, EPS["bfloat16"]
    for offset in (0, 10, 300):
        x = jnp.asarray(rng.normal(offset, 1, (n, hard.FEATURES)), jnp.bfloat16)
        as_float32, dy = np.asarray(x, np.float32), jnp.asarray(hard.cotangent(n), jnp.bfloat16)
        want = hard.oracle(as_float32, np.asarray(dy, np.float32), None, norm=norm, epsilon=EPSILON)
        s = np.sqrt(want.var + EPSILON)
        center = hard.PIVOTS[pivot](want.mean[0], s[0])
        center = None if center is None else np.float32(center)
        got = hard.run(x, dy, center, None, norm=norm, epsilon=EPSILON)
        assert got.y.dtype == got.dx.dtype == jnp.bfloat16
        y, dx = (np.asarray(v, np.float64) for v in (got.y, got.dx))
        unit = BOUND * EPS["float32"] * reference.condition(want.mean, want.var, EPSILON)
        assert np.all(np.abs(y - want.y) <= half * np.abs(want.y) + unit * (1 + np.abs(want.y)))
        # The gradient is the sum of two terms, each of which may be rounded.
        term = np.abs(np.asarray(dy, np.float64)) / s
        most = np.maximum(np.abs(want.dx).max(0), term.max(0))
        assert np.all(np.abs(dx - want.dx) <= half * (np.abs(want.dx) + term) + unit * most)
        if got.var is not None:
            assert np.all(np.abs(np.asarray(got.var) - want.var) <= unit * s**2)


@every_form
@pytest.mark.parametrize(("norm", "pivot"), PIVOTED)
def test_float64(rng, x64, form, norm, pivot):
    n = 256
    for offset in (0, 1e8):
        x, dy = rng.normal(offset, 1, (n, hard.FEATURES)), rng.normal(size=(n, hard.FEATURES))
        # With exact differences the oracle itself has no error from rounding the mean.
        x = np.round(x * 2**20) / 2**20
        want = hard.oracle(x - offset, dy, None, norm=norm, epsilon=EPSILON)
        if norm == "rms":
            want = hard.oracle(x, dy, None, norm=norm, epsilon=EPSILON)
        center = hard.PIVOTS[pivot](want.mean[0] + offset, np.sqrt(want.var[0] + EPSILON))
        got = hard.run(x, dy, center, None, norm=norm, epsilon=EPSILON)
        assert got.y.dtype == np.float64
        tolerance = BOUND * EPS["float64"] * (1 + offset)
        np.testing.assert_allclose(got.y, want.y, rtol=0, atol=4 * tolerance)
        np.testing.assert_allclose(got.dx, want.dx, rtol=0, atol=4 * tolerance)


COMPLEX = [
    *(("batch", pivot) for pivot in ("none", "s / 2 off", "3 s off", "NaN")),
    *((norm, "none") for norm in ("layer", "instance", "group")),
]


@every_form
@pytest.mark.parametrize(("norm", "pivot"), COMPLEX)
def test_complex(rng, x64, form, norm, pivot):
    """y against NumPy, dx against finite differences in complex128."""
    shape, groups = (64, hard.FEATURES), hard.FEATURES // 2

    def normalized(z):
        over, split = (0, 2), z.reshape(-1, groups, 2)
        if norm != "group":
            over, split = (0,), z
        mean = split.mean(over, keepdims=True)
        var = np.mean(np.abs(split - mean) ** 2, over, keepdims=True)
        return ((split - mean) / np.sqrt(var + 0.1)).reshape(z.shape)

    z, dy, d = (rng.normal(size=shape) + 1j * rng.normal(size=shape) for _ in range(3))
    z = z + 3 - 2j
    center = hard.PIVOTS[pivot](z.mean(0), z.std(0))
    how = dict(norm=norm, epsilon=0.1)
    got = hard.run(z, dy, center, None, **how)
    np.testing.assert_allclose(got.y, normalized(z), rtol=0, atol=1e-13)
    h = 1e-6
    # JAX's cotangents are not conjugated.
    want = np.sum(dy * (normalized(z + h * d) - normalized(z - h * d))).real / (2 * h)
    np.testing.assert_allclose(np.sum(np.asarray(got.dx) * d).real, want, rtol=1e-7)
    narrow = z.astype(np.complex64)
    center = None if center is None else center.astype(np.complex64)
    got = hard.run(narrow, dy.astype(np.complex64), center, None, **how)
    assert got.y.dtype == np.complex64
    np.testing.assert_allclose(got.y, normalized(narrow), rtol=0, atol=4 * BOUND * EPS["float32"])


# Running means of four devices, as offsets from the mean of the batch in units of s.
DISAGREEING = {
    "equal": (0.5, 0.5, 0.5, 0.5),
    "one is off": (0.5, 0.5, 0.5, 0.7),
    "all differ": (-0.3, 0.1, 0.2, 1.0),
    "one is far": (0.0, 0.0, 1e4, 0.0),
    "all are far": (1e3, -1e3, 1e4, 1e5),
    "one is NaN": (0.0, np.nan, 0.0, 0.0),
    "all are infinite": (np.inf,) * 4,
}


def on_devices(transformation, shared):
    """`shared(x, pivot, mask, dy)` of arrays with a leading axis of devices."""
    if transformation == "pmap":
        return jax.pmap(shared, axis_name="d", devices=jax.devices()[:DEVICES])
    sharded = partial(jax.shard_map, mesh=mesh((DEVICES,)), check_vma=False)

    def alone(*each):
        return jax.tree.map(lambda v: v[None], shared(*(v[0] for v in each)))

    return jax.jit(sharded(alone, in_specs=P("d"), out_specs=P("d")))


@every_form
@pytest.mark.parametrize("transformation", ["pmap", "shard_map"])
def test_devices_whose_running_means_differ(rng, form, transformation):
    """All devices measure again or none does, and results equal those of the whole batch.

    The types in pmap and in shard_map with check_vma=False do not say whether the means are equal.
    """
    n = DEVICES * 64

    def shared(x, pivot, mask, dy):
        def f(x):
            stats = BatchStats(pivot, jnp.ones_like(pivot))
            options = dict(train=True, momentum=0.0, mask=mask, axis_name="d", epsilon=EPSILON)
            y, stats = normjax.batch_norm(x, stats, **options)
            return y, stats.var

        y, pullback, var = jax.vjp(f, x, has_aux=True)
        return y, var, pullback(dy)[0]

    run = on_devices(transformation, shared)

    def split(v):
        return v.reshape(DEVICES, -1, v.shape[-1])

    dy, full = hard.cotangent(n), np.ones((n, hard.FEATURES), bool)
    # Devices have different data; with the second mask one of them has no valid entry.
    steps = np.repeat(np.arange(DEVICES), 64)[:, None]
    for mask in (full, (steps != 2) & (rng.random(full.shape) < 0.7)):
        for offset in (0, 1e4):
            x = (rng.normal(offset, 1, full.shape) + 0.3 * steps).astype(np.float32)
            want = reference.standardized(x, 1.0, 0.0, dy, axes=(0,), mask=mask, epsilon=EPSILON)
            s = np.sqrt(want.var + EPSILON)
            for name, offsets in DISAGREEING.items():
                pivots = np.float32(want.mean + np.array(offsets)[:, None] * s)
                y, var, dx = run(split(x), pivots, split(mask), split(dy))
                assert np.all(np.asarray(var) == np.asarray(var)[:1]), name
                got = hard.Normed(y.reshape(x.shape), var[:1], dx.reshape(x.shape))
                assert max(hard.units(got, want, dy, EPSILON)) <= BOUND, (name, offset)
