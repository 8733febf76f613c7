"""Batch renormalization and virtual batches."""

import os
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax.linen
from benchmarks import hlo
from normjax import BatchStats, batch_norm, batch_renorm
from tests import reference

KEY = jax.random.key(0)


def oracle(x, stats, scale, bias, dy, r_max, d_max, mask=None, epsilon=1e-5):
    """Ioffe (2017), Algorithm 1: with constant r and d, batch norm of another scale and bias."""
    plain = reference.batch_norm(x, dy=dy, axes=(0,), mask=mask, epsilon=epsilon)
    running = np.sqrt(np.asarray(stats.var) + epsilon)
    r = np.clip(np.sqrt(plain.var + epsilon) / running, 1 / r_max, r_max)
    d = np.clip((plain.mean - stats.mean) / running, -d_max, d_max)
    r_scale, d_bias = r * scale, d * scale + bias
    got = reference.batch_norm(x, r_scale, d_bias, dy, axes=(0,), mask=mask, epsilon=epsilon)
    return got._replace(dscale=got.dscale * r + got.dbias * d)


@pytest.fixture
def case(rng):
    x, dy = rng.normal(2, 3, (2, 12, 4))
    scale, bias = rng.normal(1, 0.5, (2, 4))
    return x, scale, bias, dy, BatchStats(rng.normal(size=4), rng.random(4) * 20)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounds", [(3.0, 5.0), (1.1, 0.2), (1.0, 0.0)])
def test_float64_equals_the_oracle(rng, x64, case, bounds, masked):
    x, scale, bias, dy, stats = case
    r_max, d_max = bounds
    mask = rng.random((12, 1)) < 0.7 if masked else None

    def f(x, scale, bias):
        options = dict(train=True, r_max=r_max, d_max=d_max, mask=mask, momentum=0.9)
        return batch_renorm(x, stats, scale, bias, **options)

    y, pullback, new = jax.vjp(f, x, scale, bias, has_aux=True)
    want = oracle(x, stats, scale, bias, dy, r_max, d_max, mask)
    for got, expected in zip(
        (y, *pullback(dy)), (want.y, want.dx, want.dscale, want.dbias), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(new.mean, 0.9 * stats.mean + 0.1 * want.mean, rtol=1e-12)
    np.testing.assert_allclose(new.var, 0.9 * stats.var + 0.1 * want.var, rtol=1e-12)


def test_batch_renorm_guarantee_no_gradient(case):
    x, _, _, _, stats = case

    def loss(mean, var):
        return jnp.sum(batch_renorm(x, BatchStats(mean, var), train=True)[0] ** 2)

    stats = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), stats)
    for g in jax.grad(loss, (0, 1))(stats.mean, stats.var):
        np.testing.assert_array_equal(g, np.zeros(4))


def test_batch_renorm_guarantee_shared_exactly(rng):
    x = rng.normal(2, 3, (4, 6, 3)).astype(np.float32)
    mask = rng.random((4, 6, 1)) < 0.6
    mask[1] = False
    stats = BatchStats.make(3)
    step = partial(batch_renorm, stats=stats, train=True)
    y, new = jax.vmap(lambda x, m: step(x, mask=m, axis_name="d"), axis_name="d")(x, mask)
    want, new_whole = step(x.reshape(24, 3), mask=mask.reshape(24, 1))
    np.testing.assert_allclose(y.reshape(24, 3), want, atol=1e-5)
    np.testing.assert_allclose(new.var[2], new_whole.var, rtol=1e-5)


def test_batch_renorm_edge_r_max_1_d_max_0(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    stats = BatchStats.make(3)
    got = batch_renorm(x, stats, train=True, r_max=1, d_max=0)
    want = batch_norm(x, stats, train=True)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), got, want)


def test_batch_renorm_edge_bounds_never_reached(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    stats = BatchStats.make(3)
    y, _ = batch_renorm(x, stats, train=True, r_max=1e3, d_max=1e3)
    want, _ = batch_norm(x, stats, train=False)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


def test_evaluation_is_that_of_batch_norm(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    stats = BatchStats(jnp.ones(3), jnp.full(3, 4.0))
    y, same = batch_renorm(x, stats, train=False)
    assert same is stats
    np.testing.assert_array_equal(y, batch_norm(x, stats, train=False)[0])


def test_bounds_may_follow_a_schedule(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    stats = BatchStats.make(3, counted=True)

    def r_max(step):
        return 1 + step

    def d_max(step):
        return step * 0.5

    for k in range(3):
        y, moved = batch_renorm(x, stats, train=True, r_max=r_max, d_max=d_max)
        want, _ = batch_renorm(x, stats, train=True, r_max=1 + k, d_max=k * 0.5)
        np.testing.assert_allclose(y, want, atol=1e-5)
        stats = moved
    with pytest.raises(ValueError, match=r"r_max is a schedule, which needs stats.count"):
        batch_renorm(x, BatchStats.make(3), train=True, r_max=r_max)


def test_bounds_out_of_range_are_refused():
    x, stats = np.ones((4, 3), np.float32), BatchStats.make(3)
    for options, words in (
        (dict(r_max=0.5), r"r_max=0.5, expected a number of at least 1"),
        (dict(d_max=-1), r"d_max=-1, expected a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            batch_renorm(x, stats, train=True, **options)
    with pytest.raises(TypeError, match=r"stats is NoneType, expected BatchStats\. Make it"):
        batch_renorm(x, None, train=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equals_keras(rng):
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras", reason="keras is not installed")
    x = rng.normal(2, 3, (16, 3)).astype(np.float32)
    clipping = dict(rmax=1.5, rmin=1 / 1.5, dmax=0.7)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        layer = keras.layers.BatchNormalization(
            renorm=True, renorm_clipping=clipping, renorm_momentum=0.9, momentum=0.9, epsilon=1e-5
        )
        want = np.asarray(layer(x, training=True))
    y, _ = batch_renorm(x, BatchStats.make(3), train=True, r_max=1.5, d_max=0.7)
    np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.usefixtures("lenient")
def test_the_module_has_the_same_variables_as_batch_norm(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    module = normjax.linen.BatchRenorm(r_max=2.0, d_max=1.0, momentum=0.9)
    variables = module.init(KEY, x, train=True)
    flax = nn.BatchNorm().init(KEY, x, use_running_average=False)
    jax.tree.map(np.testing.assert_array_equal, variables, flax)
    y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    want, stats = batch_renorm(
        x, BatchStats.make(3), train=True, r_max=2.0, d_max=1.0, momentum=0.9
    )
    np.testing.assert_allclose(y, want, atol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], stats.var, rtol=1e-6)


def test_the_module_counts_steps_for_a_schedule(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    module = normjax.linen.BatchRenorm(r_max=lambda step: 1 + step, d_max=lambda step: step)
    variables = module.init(KEY, x, train=True)
    y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, reference.batch_norm(x, axes=(0,)).y, atol=1e-5)
    np.testing.assert_array_equal(updates["batch_stats"]["count"], np.ones(3))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_virtual_batches_are_independent(rng, size, masked):
    x = rng.normal(2, 3, (12, 5, 4)).astype(np.float32)
    mask = rng.random((12, 5, 1)) < 0.7 if masked else None
    scale = rng.normal(1, 1, (12, 4)).astype(np.float32)
    step = partial(batch_norm, train=True, momentum=0.0)
    y, stats = step(x, BatchStats.make(4), scale, mask=mask, virtual_batch_size=size)
    for i in range(0, 12, size):
        part = slice(i, i + size)
        alone, _ = step(x[part], None, scale[part], mask=None if mask is None else mask[part])
        np.testing.assert_allclose(y[part], alone, atol=1e-4)
    want = reference.batch_norm(x, axes=(0, 1), mask=mask)
    np.testing.assert_allclose(stats.mean, want.mean, rtol=1e-5)
    np.testing.assert_allclose(stats.var, want.var, rtol=1e-5)


def test_virtual_batches_share_only_the_running_statistics(rng):
    x = rng.normal(2, 3, (4, 6, 3)).astype(np.float32)
    options = dict(train=True, momentum=0.0, virtual_batch_size=3)
    step = partial(batch_norm, stats=BatchStats.make(3), **options)
    y, stats = jax.vmap(lambda x: step(x, axis_name="d"), axis_name="d")(x)
    np.testing.assert_allclose(y, jax.vmap(lambda x: step(x)[0])(x), atol=1e-6)
    np.testing.assert_allclose(stats.var[1], x.reshape(24, 3).var(0), rtol=1e-5)


def test_virtual_batches_are_local_under_sharded_jit(rng):
    """If the rows of each device are a virtual batch, the output needs no communication."""
    devices = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x = rng.normal(2, 3, (16, 3)).astype(np.float32)
    placed = jax.device_put(x, NamedSharding(devices, P("d")))
    local = jax.jit(lambda x: batch_norm(x, None, train=True, virtual_batch_size=4)[0])
    assert not hlo.parse(local.lower(placed).compile().as_text()).collectives()
    for i in range(0, 16, 4):
        want = reference.batch_norm(x[i : i + 4], axes=(0,)).y
        np.testing.assert_allclose(local(placed)[i : i + 4], want, atol=1e-5)


def test_virtual_batches_that_do_not_divide_are_refused():
    x = np.ones((6, 3), np.float32)
    for size in (4, 0, 2.0):
        with pytest.raises(ValueError, match=rf"virtual_batch_size={size} .* a divisor"):
            batch_norm(x, None, train=True, virtual_batch_size=size)
    with pytest.raises(ValueError, match="one value for each feature"):
        batch_norm(x, None, train=True, virtual_batch_size=1)


def test_the_module_takes_virtual_batches(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    module = normjax.linen.BatchNorm(virtual_batch_size=4)
    y, _ = module.init_with_output(KEY, x, train=True)
    np.testing.assert_allclose(y[4:], reference.batch_norm(x[4:], axes=(0,)).y, atol=1e-5)
