"""Promise 3: sharing over devices equals one call on the concatenated batch, by the oracle.

Each way of running on four devices computes one global loss, sum(dy * y), and returns y, the
running statistics and the gradients of x, scale and bias.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from normjax import BatchStats, batch_norm
from tests import reference
from tests.conftest import DEVICES

SHAPE, AXES, MOMENTUM = (8, 5, 3), (0, 1), 0.9


def local_loss(x, scale, bias, mask, dy, axis_name):
    """This device's part of the loss; the whole loss where there is no named axis."""
    stats = BatchStats.make(SHAPE[-1])
    y, stats = batch_norm(
        x, stats, scale, bias, train=True, mask=mask, momentum=MOMENTUM, axis_name=axis_name
    )
    return jnp.sum(dy * y), (y, stats)


def value_and_grad(loss):
    def both(x, scale, bias, mask, dy):
        def of_three(*three):
            return loss(*three, mask, dy)

        (_, (y, stats)), grads = jax.value_and_grad(of_three, (0, 1, 2), has_aux=True)(
            x, scale, bias
        )
        return y, stats, grads

    return both


def split(leaf):
    return leaf.reshape((DEVICES, -1, *leaf.shape[1:]))


def mapped(transform, sum_local_gradients):
    """pmap and its like: data with a leading device axis, parameters on every device."""

    def run(x, scale, bias, mask, dy):
        both = value_and_grad(partial(local_loss, axis_name="d"))

        def body(x, scale, bias, mask, dy):
            y, stats, (dx, dscale, dbias) = both(x, scale, bias, mask, dy)
            return y, stats, (dx, *sum_local_gradients((dscale, dbias)))

        in_axes = (0, None, None, None if mask is None else 0, 0)
        mask = None if mask is None else split(mask)
        y, stats, (dx, dscale, dbias) = transform(body, in_axes)(
            split(x), scale, bias, mask, split(dy)
        )
        for leaf in jax.tree.leaves((stats, dscale, dbias)):
            assert (np.asarray(leaf) == np.asarray(leaf)[:1]).all(), "devices disagree"
        y, dx = (np.asarray(v).reshape(x.shape) for v in (y, dx))
        first = partial(jax.tree.map, lambda leaf: np.asarray(leaf)[0])
        return y, first(stats), (dx, first(dscale), first(dbias))

    return run


def by_pmap(*args):
    return mapped(lambda f, axes: jax.pmap(f, "d", in_axes=axes), partial(lax.psum, axis_name="d"))(
        *args
    )


def by_vmap(*args):
    return mapped(
        lambda f, axes: jax.jit(jax.vmap(f, in_axes=axes, axis_name="d")),
        partial(lax.psum, axis_name="d"),
    )(*args)


def mesh(kind=AxisType.Auto, shape=(DEVICES,), names=("d",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def by_shard_map(x, scale, bias, mask, dy, *, axes=("d",), shape=(DEVICES,)):
    """With check_vma=True, where autodiff sums the gradients of replicated parameters itself."""

    def body(x, scale, bias, mask, dy):
        def loss(*args):
            local, aux = local_loss(*args, axis_name=axes if len(axes) > 1 else axes[0])
            return lax.psum(local, axes), aux

        return value_and_grad(loss)(x, scale, bias, mask, dy)

    data = P(axes)
    sharded = jax.shard_map(
        body,
        mesh=mesh(shape=shape, names=axes),
        in_specs=(data, P(), P(), P() if mask is None else data, data),
        out_specs=(data, P(), (data, P(), P())),
        check_vma=True,
    )
    return jax.jit(sharded)(x, scale, bias, mask, dy)


def by_two_axes(*args):
    return by_shard_map(*args, axes=("host", "chip"), shape=(2, 2))


def by_nested_vmap(x, scale, bias, mask, dy):
    """Two named axes, one inside the other."""

    def halves(leaf):
        return leaf.reshape((2, 2, -1, *leaf.shape[1:]))

    def body(x, scale, bias, mask, dy):
        y, stats, (dx, *rest) = value_and_grad(partial(local_loss, axis_name=("a", "b")))(
            x, scale, bias, mask, dy
        )
        return y, stats, (dx, *lax.psum(rest, ("a", "b")))

    axes = (0, None, None, None if mask is None else 0, 0)
    inner = jax.vmap(body, in_axes=axes, axis_name="b")
    outer = jax.jit(jax.vmap(inner, in_axes=axes, axis_name="a"))
    mask = None if mask is None else halves(mask)
    y, stats, (dx, dscale, dbias) = outer(halves(x), scale, bias, mask, halves(dy))
    first = partial(jax.tree.map, lambda leaf: leaf[0, 0])
    return y.reshape(x.shape), first(stats), (dx.reshape(x.shape), first(dscale), first(dbias))


def entered(mesh):
    """jax.set_mesh, which jax 0.7.0 has under another name."""
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


def by_sharded_jit(*args, kind=AxisType.Auto):
    """No axis name: jit reduces over the whole batch."""
    over_batch, everywhere = NamedSharding(mesh(kind), P("d")), NamedSharding(mesh(kind), P())
    places = (over_batch, everywhere, everywhere, over_batch, over_batch)
    args = [a if a is None else jax.device_put(a, p) for a, p in zip(args, places, strict=True)]
    with entered(mesh(kind)):
        return jax.jit(value_and_grad(partial(local_loss, axis_name=None)))(*args)


def by_explicit_jit(*args):
    return by_sharded_jit(*args, kind=AxisType.Explicit)


WAYS = {
    "pmap": by_pmap,
    "vmap": by_vmap,
    "shard_map": by_shard_map,
    "two axes of shard_map": by_two_axes,
    "nested vmap": by_nested_vmap,
    "sharded jit": by_sharded_jit,
    "sharded jit, explicit": by_explicit_jit,
}


def make_case(name, rng):
    x = rng.normal(3, 2, SHAPE).astype(np.float32)
    mask = None
    if name == "uneven rows":
        mask = (np.arange(8) < 7)[:, None, None]
    elif name == "a device with no valid row":
        mask = np.array([1, 1, 0, 0, 1, 0, 1, 1], bool)[:, None, None]
    elif name == "NaN padding":
        mask = (rng.random((8, 5, 1)) < 0.7) & (np.arange(8) < 5)[:, None, None]
        x = np.where(mask, x, np.float32(np.nan))
    elif name == "per-element mask":
        mask = rng.random(SHAPE) < 0.6
    return x, mask


CASES = ["no mask", "uneven rows", "a device with no valid row", "NaN padding", "per-element mask"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_promise_3_sharing_equals_one_call_on_the_whole_batch(rng, way, case):
    x, mask = make_case(case, rng)
    scale, bias = rng.random((2, 3)).astype(np.float32) + 0.5
    dy = rng.normal(size=SHAPE).astype(np.float32)
    y, stats, grads = WAYS[way](x, scale, bias, mask, dy)
    want = reference.batch_norm(x, scale, bias, dy, axes=AXES, mask=mask)
    # 40 entries with values up to 10: sums of 40 products round to 40 eps of 10 at the worst.
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=40 * 10 * reference.EPS["float32"])
    close(y, want.y)
    for got, expected in zip(grads, (want.dx, want.dscale, want.dbias), strict=True):
        close(got, expected)
    close(stats.mean, (1 - MOMENTUM) * want.mean)
    close(stats.var, MOMENTUM + (1 - MOMENTUM) * want.var)


def test_one_value_on_each_device_is_enough(rng):
    x = rng.normal(size=(4, 1, 3)).astype(np.float32)
    step = partial(batch_norm, stats=None, train=True, axis_name="d")
    y, _ = jax.vmap(lambda x: step(x), axis_name="d")(x)
    np.testing.assert_allclose(y[:, 0], reference.batch_norm(x[:, 0], axes=(0,)).y, atol=1e-5)


def test_groups_share_among_themselves(rng):
    x = rng.normal(size=(4, 6, 3)).astype(np.float32)
    step = partial(batch_norm, stats=None, train=True, axis_name="d")
    y, _ = jax.pmap(lambda x: step(x, axis_index_groups=[[0, 1], [2, 3]]), "d")(x)
    for half in (slice(0, 2), slice(2, 4)):
        want = reference.batch_norm(x[half], axes=(0, 1)).y
        np.testing.assert_allclose(y[half], want, atol=1e-5)


@pytest.mark.parametrize("groups", [[[0], [1, 2, 3]], [[1, 2, 3], [0]]])
def test_groups_may_be_unequal(rng, groups):
    x = rng.normal(5, 1, (4, 6, 3)).astype(np.float32)
    step = partial(batch_norm, train=True, axis_name="d", axis_index_groups=groups, momentum=0.0)
    _, stats = jax.pmap(lambda x: step(x, BatchStats.make(3)), "d")(x)
    for group in groups:
        want = reference.batch_norm(x[group], axes=(0, 1))
        for device in group:
            np.testing.assert_allclose(stats.mean[device], want.mean, rtol=1e-5)
            np.testing.assert_allclose(stats.var[device], want.var, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("place", [P("a", "b"), P(None, "b"), P("a")])
def test_features_may_be_sharded_under_jit(rng, kind, place):
    """Statistics that lie otherwise than the batch does, as those of init do."""
    x = rng.normal(3, 2, (8, 4)).astype(np.float32)
    squares = mesh(kind, (2, 2), ("a", "b"))
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


def test_a_count_that_is_known_is_not_communicated():
    """Without a mask the devices exchange two vectors in the forward pass and no scalar."""
    sharded = jax.shard_map(
        lambda x: local_loss(x, None, None, None, x, "d")[1],
        mesh=mesh(),
        in_specs=P("d"),
        out_specs=(P("d"), P()),
    )
    hlo = jax.jit(sharded).lower(jnp.ones(SHAPE)).compile().as_text()
    sums = [line for line in hlo.splitlines() if " all-reduce(" in line]
    assert len(sums) == 2
    assert all("f32[3]" in line or "f32[1,1,3]" in line for line in sums)
    assert not any("f32[]" in line.split(" all-reduce(")[0] for line in sums)
