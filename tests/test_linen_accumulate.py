"""Gradient accumulation: k micro-batches give what the whole batch gives."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import from_bytes, to_bytes
from jax import lax

import normjax
import normjax.linen
from normjax import BatchStats, Moments
from normjax.linen import empty_batch_moments, move_batch_stats
from tests import reference

pytestmark = pytest.mark.usefixtures("lenient")
KEY, EPS = jax.random.key(0), reference.EPS["float32"]
MICRO = ["batch_moments"]
LAST = ["batch_moments", "batch_stats"]
CUTS = {1: [], 2: [7], 5: [4, 8, 12, 16], 8: [2, 4, 6, 9, 11, 13, 17]}  # of 20 rows


@pytest.fixture
def x(rng):
    return rng.normal(30, 2, (20, 3)).astype(np.float32)


def accumulate(module, variables, x, cuts, **options):
    """All micro-batches keep moments; the last updates the statistics. Options are split like x."""
    pieces = list(zip(*(np.split(v, cuts) for v in (x, *options.values())), strict=True))
    for i, piece in enumerate(pieces):
        last = i == len(pieces) - 1
        named = dict(zip(("x", *options), piece, strict=True))
        apply = partial(module.apply, train=True, mutable=LAST if last else MICRO)
        _, updates = apply(variables, named.pop("x"), **named)
        variables = {**variables, **updates}
    return variables


def close_to_oracle(batch_stats, want, momentum=0.9, ddof=0):
    unbiased = want.var * want.count / (want.count - ddof)
    np.testing.assert_allclose(batch_stats["mean"], (1 - momentum) * want.mean, rtol=8 * EPS)
    # The sum of squares is around a mean of 30, which is rounded at each merge.
    np.testing.assert_allclose(
        batch_stats["var"], momentum + (1 - momentum) * unbiased, rtol=8 * 30 * EPS
    )


@pytest.mark.parametrize("kind", [normjax.linen.BatchNorm, normjax.linen.BatchRenorm])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", CUTS)
def test_micro_batches_give_the_running_statistics_of_the_whole(rng, x, k, masked, kind):
    module = kind(momentum=0.9, ddof=1)
    variables = module.init(KEY, x, train=True)
    mask = rng.random((20, 1)) < 0.7 if masked else np.ones((20, 1), bool)
    got = accumulate(module, variables, x, CUTS[k], mask=mask)
    close_to_oracle(got["batch_stats"], reference.batch_norm(x, axes=(0,), mask=mask), ddof=1)


def test_micro_batches_of_one_row_need_other_devices(x):
    """Each device has a row: the micro-batch has four, the whole batch twenty."""
    module = normjax.linen.BatchNorm(momentum=0.9, axis_name="d")
    variables = module.init(KEY, x, train=True)

    def whole(rows):
        return accumulate(module, variables, rows, [1, 2, 3, 4])

    got = jax.vmap(whole, axis_name="d")(x.reshape(4, 5, 3))
    for device in range(4):
        stats = jax.tree.map(lambda leaf, d=device: leaf[d], got["batch_stats"])
        close_to_oracle(stats, reference.batch_norm(x, axes=(0,)))
    # After the update the kept moments are empty.
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(got["batch_moments"]))


def test_a_second_batch_starts_anew(x):
    module = normjax.linen.BatchNorm(momentum=0.0)
    variables = module.init(KEY, x, train=True)
    variables = accumulate(module, variables, x + 50, CUTS[2])
    got = accumulate(module, variables, x, CUTS[2])
    close_to_oracle(got["batch_stats"], reference.batch_norm(x, axes=(0,)), momentum=0)


@pytest.mark.parametrize("options", [dict(momentum=None), dict(momentum=0.9, debias=True)])
def test_counted_averages_count_one_step(x, options):
    module = normjax.linen.BatchNorm(**options)
    variables = module.init(KEY, x, train=True)
    got = accumulate(module, variables, x, CUTS[5])
    np.testing.assert_array_equal(got["batch_stats"]["count"], np.ones(3))
    close_to_oracle(got["batch_stats"], reference.batch_norm(x, axes=(0,)), momentum=0)


def test_virtual_batches_are_kept_merged(x):
    module = normjax.linen.BatchNorm(momentum=0.9, virtual_batch_size=5)
    variables = module.init(KEY, x, train=True)
    got = accumulate(module, variables, x, [10])
    close_to_oracle(got["batch_stats"], reference.batch_norm(x, axes=(0,)))


def test_neither_init_nor_evaluation_nor_a_whole_batch_leaves_moments(x):
    module = normjax.linen.BatchNorm()
    variables = module.init(KEY, x, train=True)
    assert set(variables) == {"params", "batch_stats"}
    _, updates = module.apply(variables, x, train=True, mutable=True)
    assert "batch_moments" not in updates
    _, updates = module.apply(variables, x, train=False, mutable=MICRO)
    assert not updates.get("batch_moments")


def test_keeping_moments_does_not_change_the_running_statistics(x):
    module = normjax.linen.BatchNorm()
    variables = module.init(KEY, x, train=True)
    y, updates = module.apply(variables, x, train=True, mutable=MICRO)
    assert set(updates) == set(MICRO)
    whole, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, whole)


class Net(nn.Module):
    """Two norms, and a layer that is no norm."""

    @nn.compact
    def __call__(self, x, train):
        a = normjax.linen.BatchNorm(momentum=0.9, name="a")(x, train=train)
        b = normjax.linen.BatchRenorm(momentum=0.9, name="b")(2 * x, train=train)
        return nn.Dense(2)(a + b)


def scanned(x, start):
    net = Net()
    variables = net.init(KEY, x[0], train=False)

    def micro(moments, piece):
        y, kept = net.apply({**variables, **moments}, piece, train=True, mutable=MICRO)
        return kept, y

    kept, _ = jax.jit(partial(lax.scan, micro))(start(variables), x)
    return variables, kept["batch_moments"]


def from_empty(variables):
    return {"batch_moments": empty_batch_moments(variables["batch_stats"])}


def test_move_batch_stats_guarantee_once(x):
    variables, moments = scanned(x.reshape(5, 4, 3), from_empty)
    got = move_batch_stats(variables["batch_stats"], moments, momentum=0.9)
    want = accumulate(Net(), variables, x, CUTS[5])["batch_stats"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=8 * 60 * EPS), got, want)
    close_to_oracle(got["a"], reference.batch_norm(x, axes=(0,)))


def test_empty_batch_moments_guarantee_neutral(x):
    variables, moments = scanned(x.reshape(5, 4, 3), from_empty)
    pieces = iter(x.reshape(5, 4, 3))
    for piece in pieces:
        _, kept = Net().apply(variables, piece, train=True, mutable=MICRO)
        variables = {**variables, **kept}
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=8 * 60 * EPS), moments, variables["batch_moments"]
    )


def test_layers_without_kept_moments_stay_as_they_are(x):
    variables, moments = scanned(x.reshape(5, 4, 3), from_empty)
    got = move_batch_stats(variables["batch_stats"], {"a": moments["a"]}, momentum=0.9)
    assert got["b"] is variables["batch_stats"]["b"]
    sigma = {"sn": {"u": jnp.ones((1, 2))}}
    got = move_batch_stats({**variables["batch_stats"], **sigma}, moments, momentum=0.9)
    assert got["sn"] is sigma["sn"]
    assert "sn" not in empty_batch_moments({**variables["batch_stats"], **sigma})


def test_wrong_trees_are_named(x):
    variables, moments = scanned(x.reshape(5, 4, 3), from_empty)
    stats = variables["batch_stats"]
    with pytest.raises(ValueError, match=r"entry at '/c', and batch_stats has no.*Pass both"):
        move_batch_stats(stats, {"c": moments["a"]}, momentum=0.9)
    with pytest.raises(ValueError, match=r"entry at '/', and batch_stats has no running"):
        move_batch_stats(stats, moments["a"], momentum=0.9)
    with pytest.raises(ValueError, match=r"entries \['params', 'batch_stats'\].*Pass variables\["):
        empty_batch_moments({"params": {}, "batch_stats": 0})
    with pytest.raises(ValueError, match="momentum=None needs stats.count"):
        move_batch_stats(stats, moments, momentum=None)


def test_kept_moments_go_through_a_checkpoint(x):
    module = normjax.linen.BatchNorm(momentum=0.9)
    variables = module.init(KEY, x, train=True)
    _, kept = module.apply(variables, x[:7], train=True, mutable=MICRO)
    empty = {"batch_moments": empty_batch_moments(variables["batch_stats"])}
    loaded = from_bytes(empty, to_bytes(kept))
    assert isinstance(loaded["batch_moments"]["moments"], Moments)
    _, updates = module.apply({**variables, **loaded}, x[7:], train=True, mutable=LAST)
    close_to_oracle(updates["batch_stats"], reference.batch_norm(x, axes=(0,)))


class Stacked(nn.Module):
    """A carry for nn.scan, whose norms see inputs that do not depend on the split."""

    @nn.compact
    def __call__(self, x, _):
        normjax.linen.BatchNorm(momentum=0.9)(x, train=True)
        return x + 1, None


def test_layers_of_a_scan_keep_their_own_moments(x):
    stack = nn.scan(
        Stacked,
        variable_axes={"params": 0, "batch_stats": 0, "batch_moments": 0},
        split_rngs={"params": True},
        length=3,
    )()
    variables = first = stack.init(KEY, x, None)
    for piece in np.split(x, CUTS[2]):
        _, kept = stack.apply(variables, piece, None, mutable=MICRO)
        variables = {**variables, **kept}
    assert kept["batch_moments"]["BatchNorm_0"]["moments"].count.shape == (3, 3)
    got = move_batch_stats(first["batch_stats"], kept["batch_moments"], momentum=0.9)
    for layer in range(3):
        stats = jax.tree.map(lambda leaf, i=layer: leaf[i], got["BatchNorm_0"])
        close_to_oracle(stats, reference.batch_norm(x + layer, axes=(0,)))


def test_no_gradient_reaches_kept_moments(x):
    module = normjax.linen.BatchNorm()
    variables = module.init(KEY, x, train=True)

    def kept(x):
        _, updates = module.apply(variables, x, train=True, mutable=MICRO)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates["batch_moments"]))

    np.testing.assert_array_equal(jax.grad(kept)(jnp.asarray(x)), np.zeros_like(x))


@pytest.mark.parametrize("constant", [False, True])
def test_two_passes_give_the_gradients_of_the_whole_batch(rng, x, constant):
    """Statistics first, then normalization; moments taken as constants would be wrong."""
    scale, bias = rng.random((2, 3)).astype(np.float32) + 0.5
    dy = rng.normal(size=x.shape).astype(np.float32)
    mask = (np.arange(20) < 17)[:, None]  # 17 rows in 5 pieces of 4: uneven, by a mask

    def loss(x, scale, bias):
        pieces = jax.tree.map(lambda v: v.reshape(5, 4, -1), (x, mask, dy))

        def measured(moments, piece):
            x, mask, _ = piece
            return normjax.merge(moments, normjax.measure(x, 0, mask)), None

        def part(total, piece):
            x, mask, dy = piece
            y = normjax.normalize(x, moments.mean, moments.variance(), scale, bias, mask=mask)
            return total + jnp.sum(dy * y), y

        moments, _ = lax.scan(jax.checkpoint(measured), Moments.make(3), pieces)
        if constant:
            moments = lax.stop_gradient(moments)
        total, y = lax.scan(jax.checkpoint(part), jnp.float32(0), pieces)
        return total, y.reshape(x.shape)

    grads, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)
    want = reference.batch_norm(x, scale, bias, dy, axes=(0,), mask=mask)
    # 20 products of the size of dy y, with the condition 1 + 30 / 2 of the data.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=20 * 16 * EPS)
    close(y, want.y)
    close(grads[1], want.dscale)
    close(grads[2], want.dbias)
    if constant:
        assert np.abs(grads[0] - want.dx).max() > 0.1
    else:
        close(grads[0], want.dx)


def test_functions_fold_over_merge(x):
    pieces = [normjax.measure(piece, 0) for piece in np.split(x, CUTS[8])]
    stats = normjax.move(BatchStats.make(3), normjax.merge(*pieces), momentum=0.9)
    close_to_oracle(stats._asdict(), reference.batch_norm(x, axes=(0,)))
