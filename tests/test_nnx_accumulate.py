"""Gradient accumulation in NNX: k micro-batches equal the whole batch."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax
import normjax.linen
from normjax.nnx import BatchNorm, BatchRenorm, empty_batch_moments, move_batch_stats
from tests import reference
from tests.reference import EPS
from tests.test_linen_accumulate import CUTS, close_to_oracle

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def x(rng):
    return rng.normal(30, 2, (20, 3)).astype(np.float32)


def stats_of(layer):
    names = ("mean", "var", "count")
    return {name: getattr(layer, name)[...] for name in names if hasattr(layer, name)}


@nnx.jit
def called(model, piece, options):
    return model(piece, **options)


def accumulate(model, x, cuts, **options):
    """Accumulates in all micro-batches but the last, which updates the running statistics.

    Options are split like x.
    """
    pieces = list(zip(*(np.split(v, cuts) for v in (x, *options.values())), strict=True))
    model.set_attributes(accumulate=True)
    for i, piece in enumerate(pieces):
        if i == len(pieces) - 1:
            model.set_attributes(accumulate=False)
        called(model, piece[0], dict(zip(options, piece[1:], strict=True)))


@pytest.mark.parametrize("kind", [BatchNorm, BatchRenorm])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_micro_batches_give_the_running_statistics_of_the_whole(rng, x, k, masked, kind):
    layer = kind(3, momentum=0.9, ddof=1, rngs=nnx.Rngs(0))
    mask = rng.random((20, 1)) < 0.7 if masked else np.ones((20, 1), bool)
    accumulate(layer, x, CUTS[k], mask=mask)
    close_to_oracle(stats_of(layer), reference.batch_norm(x, axes=(0,), mask=mask), ddof=1)


def test_a_micro_batch_uses_its_own_moments_and_keeps_running_statistics(x):
    layer = BatchNorm(3, accumulate=True, rngs=nnx.Rngs(0))
    y = called(layer, x[:7], {})
    np.testing.assert_allclose(
        y, reference.batch_norm(x[:7], axes=(0,)).y, atol=16 * 16 * EPS["float32"]
    )
    np.testing.assert_array_equal(layer.mean[...], np.zeros(3))
    np.testing.assert_array_equal(layer.var[...], np.ones(3))


def test_a_second_batch_starts_with_empty_moments(x):
    layer = BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    accumulate(layer, x + 50, CUTS[2])
    assert not any(np.any(leaf) for leaf in layer.moments.get_value())
    accumulate(layer, x, CUTS[2])
    close_to_oracle(stats_of(layer), reference.batch_norm(x, axes=(0,)), momentum=0)


@pytest.mark.parametrize("options", [dict(momentum=None), dict(momentum=0.9, debias=True)])
def test_micro_batches_count_as_one_step(x, options):
    layer = BatchNorm(3, **options, rngs=nnx.Rngs(0))
    accumulate(layer, x, CUTS[5])
    np.testing.assert_array_equal(layer.count[...], np.ones(3))
    close_to_oracle(stats_of(layer), reference.batch_norm(x, axes=(0,)), momentum=0)


def test_evaluation_and_whole_batches_store_no_moments(x):
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    called(layer, x, {})
    layer.set_attributes(accumulate=True, use_running_average=True)
    called(layer, x, {})
    assert not nnx.state(layer, normjax.nnx.BatchMoments)


def test_a_frozen_layer_keeps_no_moments(x):
    layer = BatchNorm(3, frozen=True, accumulate=True, rngs=nnx.Rngs(0))
    layer(x)
    assert not any(np.any(leaf) for leaf in layer.moments.get_value())


class LinenNet(nn.Module):
    """Two batch norms and a dense layer."""

    @nn.compact
    def __call__(self, x):
        a = normjax.linen.BatchNorm(momentum=0.9, ddof=1, name="a")(x, train=True)
        b = normjax.linen.BatchRenorm(momentum=0.8, name="b")(2 * x, train=True)
        return nn.Dense(2)(a + b)


class Net(nnx.Module):
    """The same model in NNX."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = BatchNorm(3, momentum=0.9, ddof=1, rngs=rngs)
        self.b = BatchRenorm(3, momentum=0.8, rngs=rngs)
        self.dense = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.a(x) + self.b(2 * x))


@nnx.jit
@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
def micro_batches(net, piece):
    return net, net(piece)


def scanned(x):
    """A model that accumulated the moments of five micro-batches in a scan."""
    net = Net()
    net.set_attributes(accumulate=True)
    empty_batch_moments(net)
    micro_batches(net, x.reshape(5, 4, 3))
    return net


def test_move_batch_stats_guarantee_once(x):
    """Each layer uses its own momentum and ddof, after a scan over the micro-batches."""
    net = scanned(x)
    np.testing.assert_array_equal(net.a.mean[...], np.zeros(3))
    move_batch_stats(net)
    close_to_oracle(stats_of(net.a), reference.batch_norm(x, axes=(0,)), ddof=1)
    want = reference.batch_norm(2 * x, axes=(0,))
    # The mean is 60, and the values are rounded relative to it.
    close = partial(np.testing.assert_allclose, rtol=8 * 60 * EPS["float32"])
    close(net.b.mean[...], 0.2 * want.mean)
    close(net.b.var[...], 0.8 + 0.2 * want.var)
    assert not any(np.any(leaf) for leaf in net.a.moments.get_value())


def test_a_scan_in_linen_accumulates_the_same_bits(x):
    net = scanned(x)
    linen = LinenNet()
    variables = linen.init(jax.random.key(0), x[:4])

    @jax.jit
    def scan(variables, pieces):
        def micro(moments, piece):
            y, kept = linen.apply({**variables, **moments}, piece, mutable=["batch_moments"])
            return kept, y

        empty = normjax.linen.empty_batch_moments(variables["batch_stats"])
        return jax.lax.scan(micro, {"batch_moments": empty}, pieces)[0]["batch_moments"]

    kept = scan(variables, x.reshape(5, 4, 3))
    move_linen = partial(normjax.linen.move_batch_stats, {"n": variables["batch_stats"]["a"]})
    moved = move_linen({"n": kept["a"]}, momentum=0.9, ddof=1)["n"]
    for name in ("a", "b"):
        own = getattr(net, name).moments.get_value()
        jax.tree.map(np.testing.assert_array_equal, own, kept[name]["moments"])
    move_batch_stats(net)
    for name, leaf in moved.items():
        np.testing.assert_array_equal(getattr(net.a, name)[...], leaf)


def test_empty_batch_moments_guarantee_neutral(x):
    """Starting from empty moments equals letting the layer create them."""
    kept = []
    for start in (empty_batch_moments, lambda net: None):
        net = Net()
        net.set_attributes(accumulate=True)
        start(net)
        for piece in x.reshape(5, 4, 3):
            called(net, piece, {})
        kept.append([net.a.moments.get_value(), net.b.moments.get_value()])
    jax.tree.map(np.testing.assert_array_equal, *kept)


def test_layers_without_moments_are_unchanged(x):
    net = Net()
    net.a.set_attributes(accumulate=True)
    net(x)
    before = {name: np.asarray(leaf) for name, leaf in stats_of(net.b).items()}
    move_batch_stats(net)
    close_to_oracle(stats_of(net.a), reference.batch_norm(x, axes=(0,)), ddof=1)
    jax.tree.map(np.testing.assert_array_equal, stats_of(net.b), before)


def test_micro_batches_of_one_row_per_device(x):
    """Four devices: a micro-batch has four rows, the whole batch twenty."""
    layer = BatchNorm(3, momentum=0.9, axis_name="d", accumulate=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def whole(rows):
        layer = nnx.merge(graph, state, copy=True)
        for row in rows:
            layer(row[None])
        move_batch_stats(layer)
        return stats_of(layer)

    got = jax.jit(jax.vmap(whole, axis_name="d"))(x.reshape(4, 5, 3))
    for device in range(4):
        stats = {name: leaf[device] for name, leaf in got.items()}
        close_to_oracle(stats, reference.batch_norm(x, axes=(0,)))


def test_accumulated_moments_have_no_gradient(x):
    graph, state = nnx.split(BatchNorm(3, accumulate=True, rngs=nnx.Rngs(0)))

    def kept(x):
        layer = nnx.merge(graph, state, copy=True)
        layer(x)
        return sum(jnp.sum(leaf) for leaf in layer.moments.get_value())

    np.testing.assert_array_equal(jax.grad(kept)(jnp.asarray(x)), np.zeros_like(x))
