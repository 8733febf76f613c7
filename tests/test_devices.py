"""Promise 3: sharing over devices equals one call on the concatenated batch, by the oracle."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax.linen
from normjax import BatchStats, batch_norm, group_norm
from tests import reference
from tests.reference import EPS
from tests.transformations import SIZES, TRANSFORMATIONS, entered, mesh

SHAPE, AXES, MOMENTUM = (16, 4, 4), (0, 1), 0.9
every_transformation = pytest.mark.parametrize("transformation", TRANSFORMATIONS)


def loss(x, params, mask, dy, axis_name):
    y, stats = batch_norm(
        x,
        BatchStats.make(SHAPE[-1]),
        params["scale"],
        params["bias"],
        train=True,
        mask=mask,
        momentum=MOMENTUM,
        axis_name=axis_name,
    )
    return jnp.sum((dy * y).astype(jnp.float32)), (y, stats)


def cases(rng):
    """(x, mask) for each kind of mask."""
    x = rng.normal(3, 2, SHAPE).astype(np.float32)
    rows, entries = np.arange(16)[:, None, None], rng.random(SHAPE) < 0.6
    padded = (entries[..., :1] & (rows < 11)) | np.zeros(SHAPE, bool)
    return {
        "no mask": (x, None),
        "uneven rows": (x, rows < 13),
        "a device with no valid row": (x, (rows < 4) | (rows >= 8)),
        "NaN padding": (np.where(padded, x, np.float32(np.nan)), padded),
        "per-element mask": (x, entries),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)])
@every_transformation
def test_promise_3_sharing_equals_one_call_on_the_whole_batch(rng, transformation, devices, dtype):
    scale, bias = rng.random((2, SHAPE[-1])).astype(np.float32) + 0.5
    dy = jnp.asarray(rng.normal(size=SHAPE), dtype)
    run = TRANSFORMATIONS[transformation](loss, devices)
    # 64 entries with values up to 10: sums of 64 products round to 64 eps of 10 at the worst.
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=64 * 10 * EPS["float32"])
    half = EPS[dtype] if dtype == "bfloat16" else 0.0
    for name, (values, mask) in cases(rng).items():
        x = jnp.asarray(values, dtype)
        y, stats, (dx, dparams) = run(x, {"scale": scale, "bias": bias}, mask, dy)
        want = reference.batch_norm(*map(as_float64, (x, scale, bias, dy)), axes=AXES, mask=mask)
        assert y.dtype == dx.dtype == x.dtype
        # Half precision outputs are rounded once more. The gradient of x is a sum of two rounded
        # terms: dy scale / s, and the one through the statistics.
        term = np.abs(as_float64(dy) * scale / np.sqrt(want.var + 1e-5))
        within(as_float64(y), want.y, half * np.abs(want.y), f"y, {name}")
        within(as_float64(dx), want.dx, half * (np.abs(want.dx) + term), f"dx, {name}")
        close(dparams["scale"], want.dscale, err_msg=name)
        close(dparams["bias"], want.dbias, err_msg=name)
        close(stats.mean, (1 - MOMENTUM) * want.mean, err_msg=name)
        close(stats.var, MOMENTUM + (1 - MOMENTUM) * want.var, err_msg=name)


def as_float64(leaf):
    return np.asarray(leaf).astype(np.float64)


def within(got, want, rounding, name):
    error = np.abs(got - want) - rounding
    assert np.max(error - 2e-5 * np.abs(want)) < 64 * 10 * EPS["float32"], name


class Layer(nn.Module):
    """A carry for nn.scan."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x, mask):
        norm = normjax.linen.BatchNorm(momentum=0.0, axis_name=self.axis_name)
        return jnp.sin(norm(x, train=True, mask=mask)), None


class Nested(nn.Module):
    """Two members (nn.vmap) of two layers each (nn.scan)."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x, mask):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        members = nn.vmap(
            nn.scan(Layer, length=2, in_axes=nn.broadcast, **axes),
            in_axes=(-1, None),
            out_axes=(-1, None),
            axis_size=2,
            **axes,
        )
        y, _ = members(self.axis_name)(jnp.stack([x, x * x], -1), mask)
        return y


def nested_loss(x, variables, mask, dy, axis_name):
    y, updates = Nested(axis_name).apply(variables, x, mask, mutable=["batch_stats"])
    return jnp.sum(dy * y), (y[..., 0], updates)


@every_transformation
def test_modules_within_vmap_and_scan_share_as_well(rng, transformation):
    x = rng.normal(1, 1, SHAPE).astype(np.float32)
    dy = rng.normal(size=(*SHAPE, 2)).astype(np.float32)
    mask = np.arange(16)[:, None, None] < 13
    with jax.numpy_dtype_promotion("standard"):
        variables = Nested(None).init(jax.random.key(0), x, mask)
    y, updates, (dx, _) = TRANSFORMATIONS[transformation](nested_loss, 4)(x, variables, mask, dy)

    norm = partial(reference.batch_norm, axes=AXES, mask=mask)
    want_dx = 0
    for member, inner in enumerate((1, 2 * x.astype(np.float64))):
        first = norm(x.astype(np.float64) ** (member + 1))
        second = norm(np.sin(first.y))
        if member == 0:
            np.testing.assert_allclose(y, np.sin(second.y), atol=1e-4)
        stats = jax.tree.leaves(updates, is_leaf=lambda leaf: "mean" in leaf)[0]
        for layer, want in enumerate((first, second)):
            np.testing.assert_allclose(stats["var"][member, layer], want.var, rtol=1e-4)
        dy2 = norm(np.sin(first.y), dy=dy[..., member] * np.cos(second.y)).dx
        want_dx += norm(x.astype(np.float64) ** (member + 1), dy=dy2 * np.cos(first.y)).dx * inner
    # Four norms deep, each with gradients up to 10.
    np.testing.assert_allclose(dx, want_dx, atol=1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("place", [P("a", None, "b"), P(None, None, "b"), P(None, "b", "a")])
def test_group_norm_may_have_its_channels_sharded(rng, kind, place):
    x, dy = rng.normal(2, 3, (2, 4, 4, 8)).astype(np.float32)
    grid = mesh((2, 2), ("a", "b"), kind)
    put = [jax.device_put(v, NamedSharding(grid, place)) for v in (x, dy)]

    def step(x, dy):
        y, back = jax.vjp(lambda x: group_norm(x, num_groups=4), x)
        return y, *back(dy)

    with entered(grid):
        got, dx = jax.jit(step)(*put)
    cut = (4, 4, 4, 2)
    want = reference.standardized(
        x.reshape(cut), 1.0, 0.0, dy.reshape(cut), axes=(1, 3), epsilon=1e-6
    )
    np.testing.assert_allclose(got, want.y.reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(dx, want.dx.reshape(x.shape), atol=1e-5)


def test_group_norm_may_have_a_group_on_several_devices(rng):
    """Channels over named axes: one group for each half of the devices, or for all."""
    x = rng.normal(2, 3, (4, 4, 8)).astype(np.float32)

    def sharded(axis_name, grid):
        f = partial(group_norm, num_groups=1, axis_name=axis_name)
        return jax.shard_map(
            f,
            mesh=grid,
            in_specs=P(None, None, grid.axis_names),
            out_specs=P(None, None, grid.axis_names),
        )

    halves = mesh((2, 2), ("group", "member"))
    for groups, axis_name in ((1, ("group", "member")), (2, "member")):
        got = jax.jit(sharded(axis_name, halves))(x)
        cut = x.reshape(4, 4, groups, -1)
        want = reference.standardized(cut, 1.0, 0.0, cut, axes=(1, 3), epsilon=1e-6)
        np.testing.assert_allclose(got, want.y.reshape(x.shape), atol=1e-5)


def test_one_value_on_each_device_is_enough(rng):
    x = rng.normal(size=(4, 1, 3)).astype(np.float32)
    step = partial(batch_norm, stats=None, train=True, axis_name="d")
    y, _ = jax.vmap(lambda x: step(x), axis_name="d")(x)
    np.testing.assert_allclose(y[:, 0], reference.batch_norm(x[:, 0], axes=(0,)).y, atol=1e-5)


def grouped(groups, transformation, x, dy):
    """y, running variance of each device, dx, for statistics shared within groups."""

    def local(x, dy):
        y, stats = batch_norm(
            x,
            BatchStats.make(3),
            train=True,
            momentum=0.0,
            axis_name="d",
            axis_index_groups=groups,
        )
        return jnp.sum(dy * y), (y, stats.var)

    def body(x, dy):
        (_, (y, var)), dx = jax.value_and_grad(local, has_aux=True)(x[0], dy[0])
        return y[None], var[None], dx[None]

    if transformation == "pmap":
        one = jax.pmap(lambda x, dy: body(x[None], dy[None]), "d")(x, dy)
        return [v[:, 0] for v in one]
    sharded = jax.shard_map(
        body,
        mesh=mesh(),
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=transformation == "shard_map",
    )
    return jax.jit(sharded)(x, dy)


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[0], [3, 1, 2]]])
@pytest.mark.parametrize("transformation", ["pmap", "shard_map", "shard_map, unchecked"])
def test_groups_share_among_themselves(rng, transformation, groups):
    if transformation == "shard_map" and len(groups[0]) == 1:
        pytest.skip("refused, tests/test_checks_devices.py")
    x = rng.normal(5, 1, (4, 6, 3)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    y, var, dx = grouped(groups, transformation, x, dy)
    for group in groups:
        want = reference.batch_norm(x[group], dy=dy[group], axes=(0, 1))
        np.testing.assert_allclose(y[np.array(group)], want.y, atol=1e-5)
        np.testing.assert_allclose(dx[np.array(group)], want.dx, atol=1e-5)
        for device in group:
            np.testing.assert_allclose(var[device], want.var, rtol=1e-5)


def test_a_sub_axis_is_a_group(rng):
    """The recommended form: a mesh of two axes, and the name of one of them."""
    x = rng.normal(5, 1, (8, 6, 3)).astype(np.float32)
    sharded = jax.shard_map(
        lambda x: batch_norm(x, None, train=True, axis_name="chip")[0],
        mesh=mesh((2, 4), ("host", "chip")),
        in_specs=P(("host", "chip")),
        out_specs=P(("host", "chip")),
    )
    y = jax.jit(sharded)(x)
    for half in (slice(0, 4), slice(4, 8)):
        want = reference.batch_norm(x[half], axes=(0, 1)).y
        np.testing.assert_allclose(y[half], want, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("place", [P("a", "b"), P(None, "b"), P("a")])
def test_features_may_be_sharded_under_jit(rng, kind, place):
    """Also where the statistics have another sharding than the batch, as after init."""
    x = rng.normal(3, 2, (8, 4)).astype(np.float32)
    squares = mesh((2, 2), ("a", "b"), kind)
    placed = jax.device_put(x, NamedSharding(squares, place))
    step = jax.jit(partial(batch_norm, train=True, momentum=None))
    with entered(squares):
        y, stats = step(placed, BatchStats.make(4, counted=True))
        y, stats = step(placed, stats)
    want = reference.batch_norm(x, axes=(0,))
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    np.testing.assert_allclose(stats.var, want.var, rtol=1e-5)


def test_evaluation_needs_no_axis():
    y, _ = batch_norm(jnp.ones((2, 3)), BatchStats.make(3), train=False, axis_name="nowhere")
    assert y.shape == (2, 3)
