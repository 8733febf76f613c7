"""Sharded arrays: no communication of the size of the input, and correct gradients.

One program for each placement contains all functions of tests/functions.py, since compilation takes
most of the time. It is compared with one device, which other tests compare with the oracle.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from tests.functions import FUNCTIONS, arrays
from tests.transformations import entered

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SHAPE = (16, 8, 8)

# Communication is decided before code generation, so the machine code need not be fast.
jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
# Sums in float32 over 1024 entries of up to 10, in another order.
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)

# The axis types of a mesh of (4, 2), and the placement of x.
PLACES = {
    "auto": ((AUTO, AUTO), P("a", None, "b")),
    "explicit": ((EXPLICIT, EXPLICIT), P("a", None, "b")),
    "explicit, examples": ((EXPLICIT, EXPLICIT), P(("a", "b"))),
    "explicit and auto": ((EXPLICIT, AUTO), P("a", "b")),
}


@cache
def inputs():
    rng = np.random.default_rng(7)
    given = {name: arrays(name, rng, SHAPE) for name in FUNCTIONS}
    return given, rng.normal(size=SHAPE).astype(np.float32)


def results(given, dy, *, alone, axis_name=None, axes=None):
    """The output of every function, and the gradients by all arrays or by each array alone.

    If `axes` of the arrays are given, functions are mapped over them.
    """
    found = {}
    for name, named in given.items():

        def call(named, name=name):
            return FUNCTIONS[name](axis_name, **named)

        def loss(moving, name=name, named=named, call=call):
            each = call if axes is None else jax.vmap(call, (axes[name],))
            y = each({**named, **moving})
            total = jnp.sum(dy * y)
            return total, y

        gradient = jax.grad(loss, has_aux=True)
        each = [{key: v} for key, v in named.items()] if alone else [named]
        grads, ys = zip(*map(gradient, each), strict=True)
        found[name] = ys[0], {key: v for grad in grads for key, v in grad.items()}
    return found


@cache
def on_one_device():
    return jit(partial(results, alone=False))(*inputs())


@cache
def placed(case, alone):
    """The program compiled for a placement, and its arguments."""
    kinds, place = PLACES[case]
    grid = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)

    def put(v):
        return jax.device_put(v, NamedSharding(grid, place if v.ndim == len(SHAPE) else P()))

    given = jax.tree.map(put, inputs())
    with entered(grid):
        return jit(partial(results, alone=alone)).lower(*given).compile(), given


@pytest.mark.parametrize("case", PLACES)
def test_no_communication_of_the_size_of_the_input(case):
    program, (given, dy) = placed(case, case == "explicit")
    share = dy.addressable_shards[0].data.size
    large = [
        collective
        for collective in hlo.parse(program.as_text()).collectives()
        if max(shape.size for shape in collective.shapes) >= share
        # Its window contains features of other devices.
        and "local_response_norm" not in collective.op_name
    ]
    assert not large
    for y, grads in program(given, dy).values():
        assert y.sharding.is_equivalent_to(dy.sharding, 3)
        assert grads["x"].sharding.is_equivalent_to(dy.sharding, 3)


@pytest.mark.parametrize("case", ["explicit", "explicit and auto"])
def test_gradients_equal_those_of_one_device(case):
    program, given = placed(case, case == "explicit")
    jax.tree.map(close, program(*given), on_one_device())


def halves(v):
    """Splits x over two devices, along a new first axis."""
    return v.reshape(2, -1, *v.shape[1:]) if v.ndim == len(SHAPE) else v


def on_two_devices(given, dy):
    """Each half by vmap with shared statistics; gradients of parameters are summed."""
    axes = jax.tree.map(lambda v: 0 if v.ndim == len(SHAPE) else None, given)
    body = partial(results, alone=False, axis_name="a")
    found = jax.vmap(body, (axes, 0), axis_name="a")(*jax.tree.map(halves, (given, dy)))

    def whole(v, like):
        return v.reshape(like.shape) if like.ndim == len(SHAPE) else v.sum(0)

    return {
        name: (whole(y, dy), jax.tree.map(whole, grads, given[name]))
        for name, (y, grads) in found.items()
    }


def test_gradients_within_shard_map():
    """With check_vma=True, which tracks what differs between devices."""
    given, dy = inputs()
    grid = jax.make_mesh((2,), ("a",), axis_types=(AUTO,))
    place = jax.tree.map(lambda v: P("a") if v.ndim == len(SHAPE) else P(), (given, dy))
    sharded = jax.shard_map(
        partial(results, alone=True, axis_name="a"),
        mesh=grid,
        in_specs=place,
        out_specs={name: (P("a"), place[0][name]) for name in given},
    )
    put = partial(jax.tree.map, lambda v, p: jax.device_put(v, NamedSharding(grid, p)))
    got = jit(sharded)(*put((given, dy), place))
    jax.tree.map(close, got, jit(on_two_devices)(given, dy))


def test_vmap_over_an_axis_that_is_explicitly_sharded():
    """Several batches share parameters, whose gradients are sums over the batches."""
    given, dy = inputs()
    axes = jax.tree.map(lambda v: 0 if v.ndim == len(SHAPE) else None, given)
    grid = jax.make_mesh((4,), ("a",), axis_types=(EXPLICIT,))

    def many(v, axis=0):
        return v if axis is None else np.stack([v, -v, 2 * v, 3 * v])

    def put(v, axis=0):
        return jax.device_put(v, NamedSharding(grid, P() if axis is None else P("a")))

    given, dy = jax.tree.map(many, given, axes), many(dy)
    step = jit(partial(results, axes=axes, alone=False))
    with entered(grid):
        got = step(jax.tree.map(put, given, axes), put(dy))
    jax.tree.map(close, got, step(given, dy))
