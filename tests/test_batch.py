"""batch_norm against the oracle: values, statistics, gradients, every guarantee and edge case."""

from functools import partial

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import BatchStats, batch_norm
from tests import reference
from tests.compiling import DEFAULT
from tests.hard import distributions
from tests.reference import EPS
from tests.shapes import SHAPES, reduced

MASKS = ["none", "rows", "elements", "scattered"]


def make_mask(kind, rng, shape, axes):
    """Masks of several kinds; "rows" leaves out whole examples of the first reduced axis."""
    if kind == "none":
        return None
    if kind == "rows":
        valid = np.arange(shape[axes[0]]) % 3 != 1
        return np.expand_dims(valid, [a for a in range(len(shape)) if a != axes[0]])
    if kind == "elements":
        return rng.random(shape) < 0.7
    return rng.random([n if a in axes else 1 for a, n in enumerate(shape)]) < 0.6


def draw(rng, shape, axes, dtype=np.float32, loc=1.0):
    features = tuple(n for a, n in enumerate(shape) if a not in axes)
    x = rng.normal(loc, 2, shape).astype(dtype)
    scale, bias = rng.random(features) + 0.5, rng.normal(size=features)
    dy = rng.normal(size=shape)
    return x, scale.astype(dtype), bias.astype(dtype), dy.astype(dtype)


def run(x, scale, bias, dy, stats=None, **options):
    """y, stats and the gradients of x, scale and bias for the cotangent dy."""

    @jax.jit
    def both(x, scale, bias, dy, stats):
        def f(x, scale, bias):
            return batch_norm(x, stats, scale, bias, train=True, **options)

        y, pullback, stats = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, stats, pullback(dy)

    return jax.tree.map(np.asarray, both(x, scale, bias, dy, stats))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_float64_equals_the_oracle(rng, x64, name, kind):
    shape, feature_axis = SHAPES[name]
    axes = reduced(shape, feature_axis)
    args = draw(rng, shape, axes, np.float64)
    mask = make_mask(kind, rng, shape, axes)
    stats = BatchStats.make(args[1].shape, jnp.float64)
    y, stats, grads = run(*args, stats, feature_axis=feature_axis, mask=mask, momentum=0.9, ddof=1)
    want = reference.batch_norm(*args, axes=axes, mask=mask)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    close(y, want.y)
    for got, expected in zip(grads, (want.dx, want.dscale, want.dbias), strict=True):
        close(got, expected)
    moved = want.count > 1
    unbiased = want.var * want.count / np.maximum(want.count - 1, 1)
    close(stats.mean, np.where(moved, 0.1 * want.mean, 0))
    close(stats.var, np.where(moved, 0.9 + 0.1 * unbiased, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["none", "scattered"])
def test_batch_norm_guarantee_float32_inside(rng, dtype, kind):
    shape, axes = (8, 5, 6, 4), (0, 1, 2)
    x, scale, bias, dy = (jnp.asarray(v, dtype) for v in draw(rng, shape, axes, loc=20.0))
    mask = make_mask(kind, rng, shape, axes)
    y, stats, (dx, dscale, dbias) = run(x, scale, bias, dy, BatchStats.make(4), mask=mask)
    want = reference.batch_norm(x, scale, bias, dy, axes=axes, mask=mask)
    assert y.dtype == dx.dtype == jnp.dtype(dtype)
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    y, dx, dscale, dbias = (v.astype(np.float64) for v in (y, dx, dscale, dbias))
    scale, dy = np.asarray(scale, np.float64), np.asarray(dy, np.float64)
    condition = reference.condition(want.mean, want.var, 1e-5)
    single = 16 * EPS["float32"] * condition
    # y is rounded once to its dtype; dx is the sum of two parts that are rounded each.
    assert np.all(abs(y - want.y) <= EPS[dtype] * abs(want.y) + single)
    largest = np.abs(dy).max() * scale / np.sqrt(want.var)
    assert np.all(abs(dx - want.dx) <= 2 * (EPS[dtype] + single) * largest)
    np.testing.assert_allclose(stats.mean, 0.01 * want.mean, rtol=16 * EPS["float32"])
    np.testing.assert_allclose(stats.var, 0.99 + 0.01 * want.var, rtol=16 * EPS["float32"])
    count = want.count.max()
    for got, expected in ((dscale, want.dscale), (dbias, want.dbias)):
        assert np.all(abs(got - expected) <= EPS[dtype] * abs(expected) + single * np.sqrt(count))


def test_batch_norm_keeps_float64_and_complex(rng, x64):
    x = rng.normal(1e6, 1, (64, 3))
    y, stats = batch_norm(x, BatchStats.make(3, jnp.float64), train=True)
    np.testing.assert_allclose(y, reference.batch_norm(x, axes=(0,)).y, atol=1e-8)
    assert y.dtype == stats.mean.dtype == jnp.float64

    z = x + 1j * rng.normal(-3, 2, x.shape)
    y, stats = batch_norm(z, BatchStats.make(3, jnp.complex128), train=True, momentum=0.0)
    np.testing.assert_allclose(stats.mean, z.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.var, np.var(z, axis=0), rtol=1e-12)
    np.testing.assert_allclose(y, (z - z.mean(0)) / np.sqrt(np.var(z, axis=0) + 1e-5), atol=1e-8)


def test_complex_gradient_equals_finite_differences(rng, x64):
    z = rng.normal(1, 1, (6, 2)) + 1j * rng.normal(size=(6, 2))
    w = rng.normal(size=(6, 2)) + 1j * rng.normal(size=(6, 2))
    d = rng.normal(size=(6, 2)) + 1j * rng.normal(size=(6, 2))

    def loss(z):
        mean, var = z.mean(0), (abs(z - z.mean(0)) ** 2).mean(0)
        return ((w * (z - mean) / (var + 0.1) ** 0.5).real).sum()

    def ours(z):
        return jnp.real(w * batch_norm(z, None, train=True, epsilon=0.1)[0]).sum()

    h = 1e-6
    want = (loss(z + h * d) - loss(z - h * d)) / (2 * h)
    assert jax.jvp(ours, (z,), (d,))[1] == pytest.approx(want, rel=1e-7)
    assert (jax.grad(ours)(z) * d).real.sum() == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("n", [256, 40_000])
def test_promise_1_stable_at_the_price_of_fast(n):
    """Errors in units of eps (1 + |m| / s), the error from rounding the mean alone; at most 16.

    s includes epsilon, so that constant channels have a unit. epsilon is 0 where it would exceed
    the variance of the data.
    """
    c, worst = 4, {}
    dy = np.random.default_rng(4).normal(size=(n, c)).astype(np.float32)

    @partial(jax.jit, static_argnames="epsilon", compiler_options=DEFAULT)
    def step(x, dy, epsilon):
        def f(x):
            y, s = batch_norm(x, BatchStats.make(c), train=True, momentum=0.0, epsilon=epsilon)
            return y, s

        y, pullback, stats = jax.vjp(f, x, has_aux=True)
        return y, stats.var, pullback(dy)[0]

    for name, data in distributions(n, c):
        x = data.astype(np.float32)
        epsilon = 0.0 if name == "scale 1e-12" else 1e-5
        y, var, dx = (np.asarray(v, np.float64) for v in step(x, dy, epsilon))
        want = reference.batch_norm(x, dy=dy, axes=(0,), epsilon=epsilon)
        unit = EPS["float32"] * reference.condition(want.mean, want.var, epsilon)
        gain = (want.var + epsilon) ** -0.5
        size = np.maximum(np.abs(want.dx).max(0), np.abs(dy).max(0) * gain)
        worst[name] = (
            np.max(np.abs(y - want.y) / (unit * np.maximum(1, np.abs(want.y)))),
            np.max(np.abs(var - want.var) / (unit * (want.var + epsilon))),
            np.max(np.abs(dx - want.dx) / (unit * size)),
        )
    beyond = {name: units for name, units in worst.items() if not max(units) <= 16}
    assert not beyond, beyond


def test_batch_norm_guarantee_stable(rng):
    """The fast formula, flax's default, misses the same bound by orders of magnitude."""
    flax_linen = pytest.importorskip("flax.linen")
    x = rng.normal(1e4, 1, (4096, 4)).astype(np.float32)
    want = reference.batch_norm(x, axes=(0,))
    unit = EPS["float32"] * reference.condition(want.mean, want.var, 1e-5)
    ours, _ = batch_norm(x, None, train=True)
    with jax.numpy_rank_promotion("allow"):
        flax = flax_linen.BatchNorm(use_running_average=False)
        theirs, _ = flax.init_with_output(jax.random.key(0), x)
    assert np.max(abs(np.asarray(ours) - want.y) / unit) <= 16
    assert np.max(abs(np.asarray(theirs) - want.y) / unit) > 1e3


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_batch_norm_guarantee_masked_out_means_out(rng, poison):
    x, scale, bias, dy = draw(rng, (8, 5, 3), (0, 1))
    mask = rng.random((8, 5, 1)) < 0.6
    stats = BatchStats.make(3)
    zeroed, poisoned = np.where(mask, x, np.float32(0)), np.where(mask, x, np.float32(poison))
    y, stats, grads = run(poisoned, scale, bias, dy, stats, mask=mask)
    y0, stats0, grads0 = run(zeroed, scale, bias, dy, BatchStats.make(3), mask=mask)
    np.testing.assert_array_equal(y, y0)
    jax.tree.map(np.testing.assert_array_equal, (stats, grads[1:]), (stats0, grads0[1:]))
    want = reference.batch_norm(poisoned, scale, bias, dy, axes=(0, 1), mask=mask)
    np.testing.assert_allclose(grads[0], want.dx, atol=1e-5)
    # A finite masked entry keeps its own value and is normalized by the others' statistics.
    y, _, grads = run(x, scale, bias, dy, mask=mask)
    want = reference.batch_norm(x, scale, bias, dy, axes=(0, 1), mask=mask)
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    np.testing.assert_allclose(grads[0], want.dx, atol=1e-5)


def test_batch_norm_guarantee_statistics_stay_finite(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    poisoned = x.copy()
    poisoned[2, 1] = np.nan
    _, clean = batch_norm(x, BatchStats.make(3), train=True)
    _, stats = batch_norm(poisoned, BatchStats.make(3), train=True)
    for got, new, old in zip(stats[:2], clean, BatchStats.make(3), strict=False):
        # A platform may measure the poisoned batch with another algorithm, in all of its features.
        np.testing.assert_allclose(
            got, np.where(np.arange(3) == 1, old, new), rtol=4 * EPS["float32"]
        )


def test_batch_norm_guarantee_no_gradient(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    start = BatchStats.make(3)

    def next_statistics(x, mean):
        _, stats = batch_norm(x, start._replace(mean=mean), train=True)
        return jnp.sum(stats.mean + stats.var)

    def evaluated(mean, var):
        y, _ = batch_norm(x, BatchStats(mean, var), train=False)
        return jnp.sum(y**2)

    for gradients in (
        jax.grad(next_statistics, (0, 1))(x, start.mean),
        jax.grad(evaluated, (0, 1))(start.mean, start.var),
    ):
        assert all(np.all(np.asarray(g) == 0) for g in gradients)


def test_batch_norm_guarantee_light_backward(saved_arrays):
    """Promise 7: residuals are x in its own dtype, the mask as given, and per-feature vectors."""
    vector = jnp.ones(6)
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jnp.ones((4, 5, 6), dtype)
        for mask, sizes in ((None, []), (jnp.ones((4, 5, 1), bool), [20])):
            f = partial(batch_norm, stats=None, train=True, mask=mask)
            kept = saved_arrays(lambda x, s, b, f=f: f(x, scale=s, bias=b)[0], x, vector, vector)
            assert [k for k in kept if k.size == x.size] == [jax.ShapeDtypeStruct(x.shape, dtype)]
            assert sorted(k.size for k in kept if 6 < k.size < x.size) == sizes
            assert max(k.size for k in kept) == x.size


def test_batch_norm_guarantee_shared_exactly(rng):
    """The short form of tests/test_devices.py: four devices with unequal counts, one empty."""
    x = rng.normal(3, 2, (4, 6, 3)).astype(np.float32)
    mask = rng.random((4, 6, 1)) < 0.6
    mask[1] = False
    shared = partial(batch_norm, train=True, axis_name="d", momentum=0.0)
    step = jax.vmap(lambda x, m: shared(x, BatchStats.make(3), mask=m), axis_name="d")
    y, stats = step(x, mask)
    want = reference.batch_norm(x, axes=(0, 1), mask=mask)
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    np.testing.assert_allclose(stats.var[1], want.var, rtol=1e-5)


@pytest.mark.parametrize("n", [3, 1000, 40_000])
def test_batch_norm_edge_constant_feature(n):
    # A plain sum of such constants rounds, and 1 / sqrt(epsilon) = 300 multiplies the error.
    constants = jnp.array([0.1, -7.0, 1e3 / 3, 1e6 / 7, 1e20])
    bias = jnp.arange(5.0)
    x = jnp.broadcast_to(constants, (n, 5))
    y, stats = batch_norm(x, BatchStats.make(5), jnp.full(5, 5.0), bias, train=True, momentum=0)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (n, 5)))
    np.testing.assert_array_equal(stats.mean, constants)


def test_batch_norm_edge_feature_with_every_entry_masked(rng):
    x = rng.normal(size=(6, 2)).astype(np.float32)
    mask = np.ones((6, 2), bool)
    mask[:, 1] = False
    start = BatchStats(jnp.array([4.0, 5.0]), jnp.array([6.0, 7.0]))
    scale, bias, dy = np.ones(2, np.float32), np.ones(2, np.float32), np.ones_like(x)
    y, stats, grads = run(x, scale, bias, dy, start, mask=mask)
    np.testing.assert_allclose(y[:, 1], x[:, 1] / np.sqrt(1e-5) + 1, rtol=1e-6)
    assert (stats.mean[1], stats.var[1]) == (5, 7)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("ddof", [0, 1])
def test_batch_norm_edge_one_valid_entry(ddof):
    x = jnp.array([[3.0], [8.0]])
    mask = jnp.array([[True], [False]])
    y, stats = batch_norm(x, BatchStats.make(1), train=True, mask=mask, momentum=0.0, ddof=ddof)
    assert float(y[0, 0]) == 0
    assert (float(stats.mean[0]), float(stats.var[0])) == ((3, 0) if ddof == 0 else (0, 1))


def test_batch_norm_edge_nan_or_infinity_that_counts(rng):
    x = rng.normal(size=(6, 3)).astype(np.float32)
    x[1, 0], x[2, 1] = np.nan, np.inf
    start = BatchStats.make(3)
    y, stats = batch_norm(x, start, train=True)
    assert np.isnan(y[:, :2]).all()
    assert np.isfinite(y[:, 2]).all()
    np.testing.assert_array_equal(stats.mean[:2], start.mean[:2])


def test_batch_norm_edge_nan_or_infinity_that_is_masked():
    x = jnp.array([[1.0], [3.0], [jnp.nan]])
    mask = jnp.array([[True], [True], [False]])
    for train, want in ((True, -2.0), (False, 0.0)):
        options = dict(train=train, mask=mask, epsilon=0.0)
        y, pullback, _ = jax.vjp(
            lambda x, o=options: batch_norm(x, BatchStats.make(1), **o), x, has_aux=True
        )
        assert float(y[2, 0]) == want
        assert float(pullback(jnp.ones((3, 1)))[0][2, 0]) == 0


def test_batch_norm_edge_deviations_beyond_1_8e19_sqrt_n():
    start, bias, signs = BatchStats.make(1), jnp.array([2.0]), np.tile([1.0, -1.0], 50)[:, None]
    for deviation, inside in ((1.8e18, True), (1.9e18, False), (1e20, False)):
        x = jnp.asarray(deviation * signs, jnp.float32)
        y, stats = batch_norm(x, start, None, bias, train=True)
        np.testing.assert_allclose(y, 2 + signs * inside, rtol=1e-6)
        assert bool(stats.var > start.var) == inside


def test_batch_norm_edge_dy_below_1e_38_var(rng):
    x, dy = rng.normal(size=(2, 20, 3))
    x, dy = (1e15 * x).astype(np.float32), dy + x / 1e15
    _, pullback = jax.vjp(lambda x: batch_norm(x, None, train=True)[0], x)
    for size, inside in ((1e-5, True), (1e-10, False)):
        (dx,) = pullback((size * dy).astype(np.float32))
        r = reference.batch_norm(x, dy=size * dy, axes=(0,))
        want = r.dx if inside else size * (dy - dy.mean(0)) / np.sqrt(r.var)
        np.testing.assert_allclose(dx, want, atol=1e-5 * np.max(abs(want)))


def test_batch_norm_edge_empty_batch_train_false():
    stats = BatchStats.make(3)
    y, same = batch_norm(jnp.ones((0, 3)), stats, train=False)
    assert y.shape == (0, 3)
    assert same == stats


def test_batch_norm_edge_momentum_1(rng):
    x = rng.normal(5, 2, (16, 2)).astype(np.float32)
    start = BatchStats.make(2)
    _, stats = batch_norm(x, start, train=True, momentum=1)
    jax.tree.map(np.testing.assert_array_equal, stats, start)


def test_batch_norm_edge_momentum_0(rng):
    x = rng.normal(5, 2, (16, 2)).astype(np.float32)
    _, stats = batch_norm(x, BatchStats.make(2), train=True, momentum=0)
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, x.var(0), rtol=1e-5)


def test_batch_norm_edge_float32_stats_float64_x(x64):
    _, stats = batch_norm(jnp.ones((4, 2), jnp.float64), BatchStats.make(2), train=True)
    assert stats.mean.dtype == stats.var.dtype == jnp.float64


def test_train_false_returns_the_same_statistics(rng):
    x = rng.normal(size=(6, 3)).astype(np.float32)
    stats = BatchStats(jnp.array([1.0, 2, 3]), jnp.array([4.0, 5, 6]))
    y, same = batch_norm(x, stats, train=False)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    want = (x - [1, 2, 3]) / np.sqrt(np.array([4, 5, 6]) + 1e-5)
    np.testing.assert_allclose(y, want, atol=1e-6)


def test_without_statistics_both_modes_normalize_by_the_batch(rng):
    x = rng.normal(size=(6, 3)).astype(np.float32)
    for train in (True, False):
        y, stats = batch_norm(x, None, train=train)
        assert stats is None
        np.testing.assert_allclose(y, reference.batch_norm(x, axes=(0,)).y, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        (dict(momentum=0.9), False),
        (dict(momentum=None), True),
        (dict(momentum=0.9, debias=True), True),
    ],
)
def test_promise_8_train_then_eval_is_one_act(rng, options, counted):
    """Evaluation after k steps on one batch equals the formula; if debiased, from step 1 on."""
    x = rng.normal(50, 0.01, (64, 3)).astype(np.float32)
    want = reference.batch_norm(x, axes=(0,))
    stats = BatchStats.make(3, counted=counted)
    for k in range(1, 6):
        _, stats = batch_norm(x, stats, train=True, epsilon=0.0, **options)
        y, _ = batch_norm(x, stats, train=False, epsilon=0.0)
        mean, var = want.mean, want.var
        if not counted:
            mean, var = (reference.running(i, b, 0.9, k) for i, b in ((0, mean), (1, var)))
        unit = EPS["float32"] * reference.condition(want.mean, want.var, 0)
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var), atol=8 * unit.max())


@pytest.mark.parametrize("masked", [False, True])
def test_promise_6_every_derivative_mode(rng, x64, masked):
    """jvp, vjp and second order in all four combinations, under jit, vmap and remat."""
    x, scale, bias, w = draw(rng, (7, 3), (0,), np.float64)
    v, u = rng.normal(size=(2, 7, 3))
    mask = rng.random((7, 3)) < 0.7 if masked else None

    def ours(x):
        y, _ = batch_norm(x, None, scale, bias, train=True, mask=mask)
        return jnp.sum(w * y**2)

    def forward(x):  # x may be complex, for the complex step
        return (w * textbook(x, scale, bias, mask) ** 2).sum()

    def gradient(x):
        y = textbook(x, scale, bias, mask)
        return textbook_vjp(x, scale, mask, 2 * w * y)

    first = reference.complex_step(forward, x, v)
    second = reference.complex_step(gradient, x, v)
    np.testing.assert_allclose((gradient(x) * v).sum(), first, rtol=1e-10)  # the oracle agrees

    rev, fwd = jax.grad(ours), jax.jacfwd(ours)
    pushed = jax.jit(lambda x: jax.jvp(ours, (x,), (v,))[1])
    np.testing.assert_allclose(pushed(x), first, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(rev)(x), gradient(x), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(jax.jit(fwd)(x), gradient(x), rtol=1e-9, atol=1e-12)
    close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10)

    def apply(hessian):
        return jnp.einsum("aibj,bj->ai", hessian, v)

    products = (
        lambda x: jax.jvp(rev, (x,), (v,))[1],
        lambda x: jax.grad(lambda x: jnp.vdot(rev(x), v))(x),
        lambda x: jax.grad(lambda x: jax.jvp(ours, (x,), (v,))[1])(x),
        lambda x: apply(jax.hessian(ours)(x)),
        lambda x: apply(jax.jacfwd(jax.jacrev(ours))(x)),
        lambda x: apply(jax.jacrev(jax.jacfwd(ours))(x)),
        lambda x: apply(jax.jacrev(jax.jacrev(ours))(x)),
        lambda x: apply(jax.jacfwd(jax.jacfwd(ours))(x)),
        lambda x: jax.jvp(jax.grad(jax.checkpoint(ours)), (x,), (v,))[1],
    )

    def every(x):
        return [product(x) for product in products]

    for got in jax.jit(every)(x):
        close(got, second)
    elsewhere = reference.complex_step(gradient, x + u, v)
    for batched in jax.jit(jax.vmap(every))(jnp.stack([x, x + u])):
        close(batched[0], second)
        close(batched[1], elsewhere)


def textbook(x, scale, bias, mask):
    """The forward formula on possibly complex x, without the oracle's guards."""
    m = np.ones(x.shape) if mask is None else mask
    n = m.sum(0)
    mean = (m * x).sum(0) / n
    var = (m * (x - mean) ** 2).sum(0) / n
    return (x - mean) * (var + 1e-5) ** -0.5 * scale + bias


def textbook_vjp(x, scale, mask, dy):
    """The gradient of `textbook`, as in the paper."""
    m = np.ones(x.shape) if mask is None else mask
    n = m.sum(0)
    mean = (m * x).sum(0) / n
    d = x - mean
    inv = ((m * d**2).sum(0) / n + 1e-5) ** -0.5
    g = dy * scale
    return inv * (g - m * g.sum(0) / n - m * d * inv**2 * (g * d).sum(0) / n)


def test_promise_6_scan_carries_the_statistics(rng):
    xs = rng.normal(2, 3, (5, 8, 3)).astype(np.float32)

    @jax.jit
    def train(xs):
        def step(stats, x):
            y, stats = batch_norm(x, stats, train=True, momentum=0.5)
            return stats, y

        return jax.lax.scan(step, BatchStats.make(3), xs)

    stats, ys = train(xs)
    mean = np.zeros(3)
    for x, y in zip(xs, ys, strict=True):
        want = reference.batch_norm(x, axes=(0,))
        np.testing.assert_allclose(y, want.y, atol=1e-5)
        mean = 0.5 * mean + 0.5 * want.mean
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)


def test_exports_for_any_batch_size(rng):
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    step = jax.jit(lambda x: batch_norm(x, BatchStats.make(3), train=True, momentum=0.0))
    exported = export.export(step)(x)
    for n in (2, 5):
        data = rng.normal(1, 2, (n, 3)).astype(np.float32)
        y, stats = exported.call(data)
        np.testing.assert_allclose(y, reference.batch_norm(data, axes=(0,)).y, atol=1e-5)
        np.testing.assert_allclose(stats.mean, data.mean(0), atol=1e-5)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shape_any_axes_any_mask(data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=5, max_side=4), "shape")
    rank = len(shape)
    count = data.draw(st.integers(1, rank - 1), "how many feature axes")
    kept = data.draw(st.permutations(range(rank)), "axes")[:count]
    signed = tuple(a - rank if data.draw(st.booleans()) else a for a in kept)
    axes = reduced(shape, signed)
    hypothesis.assume(np.prod([shape[a] for a in axes]) > 1)
    free = data.draw(st.lists(st.booleans(), min_size=rank, max_size=rank), "mask axes")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    mask = rng.random([n if f else 1 for n, f in zip(shape, free, strict=True)]) < 0.7
    x = rng.normal(1, 2, shape).astype(np.float32)
    y, stats = batch_norm(
        x,
        BatchStats.make([n for a, n in enumerate(shape) if a not in axes]),
        train=True,
        feature_axis=signed,
        mask=mask,
        momentum=0.0,
        epsilon=0.1,
    )
    want = reference.batch_norm(x, axes=axes, mask=mask, epsilon=0.1)
    np.testing.assert_allclose(y, want.y, atol=1e-4)
    np.testing.assert_allclose(stats.mean, np.where(want.count, want.mean, 0), atol=1e-5)
    np.testing.assert_allclose(stats.var, np.where(want.count, want.var, 1), rtol=1e-4, atol=1e-6)
