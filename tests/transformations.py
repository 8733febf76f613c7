"""Every transformation by which JAX runs one step on many devices, with one signature.

Each takes `loss(x, params, mask, dy, axis_name) -> (this device's part of the loss, (y, stats))`
and the number of devices, and returns `run(x, params, mask, dy) -> (y, stats, (dx, dparams))` for
whole arrays. The gradients are those of the sum of all parts. `run` is compiled once.
"""

from contextlib import nullcontext
from functools import cache, partial

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

SIZES = (4, 8)


def entered(mesh):
    """jax.set_mesh, which jax 0.7.0 has under another name."""
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


def mesh(shape=(SIZES[0],), names=("d",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def value_and_grad(loss):
    def both(x, params, mask, dy):
        (_, (y, stats)), grads = jax.value_and_grad(
            lambda *args: loss(*args, mask, dy), (0, 1), has_aux=True
        )(x, params)
        return y, stats, grads

    return both


def summed(loss, axis_name):
    """Sums the gradients of replicated parameters explicitly."""
    both = value_and_grad(partial(loss, axis_name=axis_name))

    def body(*args):
        y, stats, (dx, dparams) = both(*args)
        return y, stats, (dx, lax.psum(dparams, axis_name))

    return body


def by_map(loss, devices, *, transform, names=("d",)):
    """pmap and vmap: data with leading device axes, parameters on every device."""
    shape = (devices,) if len(names) == 1 else (devices // 2, 2)

    # One function for each structure of the arguments, since pmap keeps the first one that it saw.
    @cache
    def compiled(masked):
        body = summed(loss, names if len(names) > 1 else names[0])
        for name in reversed(names):
            body = transform(body, axis_name=name, in_axes=(0, None, 0 if masked else None, 0))
        return body if transform is jax.pmap else jax.jit(body)

    def split(leaf):
        return None if leaf is None else leaf.reshape((*shape, -1, *leaf.shape[1:]))

    def first(leaf):
        each = np.asarray(leaf).reshape(devices, *leaf.shape[len(shape) :])
        assert (each == each[:1]).all(), "devices disagree"
        return each[0]

    def run(x, params, mask, dy):
        step = compiled(mask is not None)
        y, stats, (dx, dparams) = step(split(x), params, split(mask), split(dy))
        stats, dparams = jax.tree.map(first, (stats, dparams))
        return y.reshape(x.shape), stats, (dx.reshape(x.shape), dparams)

    return run


def by_shard_map(loss, devices, *, names=("d",), kind=AxisType.Auto, check_vma=True):
    """With check_vma=True autodiff sums the gradients of replicated parameters itself."""
    shape = (devices,) if len(names) == 1 else (devices // 2, 2)
    axis_name = names if len(names) > 1 else names[0]

    def whole(*args):
        local, aux = loss(*args, axis_name=axis_name)
        return lax.psum(local, axis_name), aux

    data, grid = P(names), mesh(shape, names, kind)
    sharded = jax.shard_map(
        value_and_grad(whole) if check_vma else summed(loss, axis_name),
        mesh=grid,
        in_specs=(data, P(), data, data),
        out_specs=(data, P(), (data, P())),
        check_vma=check_vma,
    )
    return placed(jax.jit(sharded), grid, data, nullcontext)


def by_jit(loss, devices, *, kind=AxisType.Auto, names=("d",), place=("d",)):
    """No axis name: jit reduces over the whole batch."""
    shape = (devices,) if len(names) == 1 else (devices // 2, 2)
    step = jax.jit(value_and_grad(partial(loss, axis_name=None)))
    return placed(step, mesh(shape, names, kind), P(*place))


def placed(step, grid, place, context=entered):
    """Runs `step` on data that are sharded over the mesh by `place`."""

    def put(leaf, place):
        # An axis of size 1 is broadcast, and not sharded.
        axes = [axis if n > 1 else None for axis, n in zip(place, leaf.shape, strict=False)]
        return jax.device_put(leaf, NamedSharding(grid, P(*axes)))

    def run(x, params, mask, dy):
        x, mask, dy = (None if v is None else put(v, place) for v in (x, mask, dy))
        params = jax.tree.map(partial(put, place=P()), params)
        with context(grid):
            return step(x, params, mask, dy)

    return run


EXPLICIT, AB = AxisType.Explicit, ("a", "b")

TRANSFORMATIONS = {
    "pmap": partial(by_map, transform=jax.pmap),
    "vmap": partial(by_map, transform=jax.vmap),
    "nested vmap": partial(by_map, transform=jax.vmap, names=AB),
    "shard_map": by_shard_map,
    "shard_map, explicit": partial(by_shard_map, kind=EXPLICIT),
    "shard_map, unchecked": partial(by_shard_map, check_vma=False),
    "shard_map, two axes": partial(by_shard_map, names=AB),
    "jit": by_jit,
    "jit, explicit": partial(by_jit, kind=EXPLICIT),
    "jit, space": partial(by_jit, names=AB, place=("a", "b")),
    "jit, space, explicit": partial(by_jit, names=AB, place=("a", "b"), kind=EXPLICIT),
    "jit, features": partial(by_jit, names=AB, place=("a", None, "b")),
    "jit, features, explicit": partial(by_jit, names=AB, place=("a", None, "b"), kind=EXPLICIT),
}
