"""Communication between devices, read from the compiled program: collectives and their bytes."""

from collections import Counter
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from normjax import BatchStats, batch_norm, group_norm, measure, rms_norm, synchronize
from normjax._core.lowering import PLATFORMS, VARIABLE

C = 24
VECTOR = 4 * C
HASH = 4 * 64


class Traffic(NamedTuple):
    """Collectives by kind, and the bytes of all their results."""

    kinds: dict[str, int]
    bytes: int

    @property
    def number(self):
        return sum(self.kinds.values())


def traffic(program, *args):
    """Collectives in the optimized HLO of a jitted function, without those in rare branches."""
    found = hlo.parse(program.lower(*args).compile().as_text()).usual_collectives()
    return Traffic(dict(Counter(c.collective for c in found)), sum(c.bytes for c in found))


@pytest.fixture(scope="module", autouse=True)
def _compiler_combines_reductions():
    """Skips where XLA does not combine independent reductions, as for CPUs in jaxlib 0.7."""
    two = jax.shard_map(
        lambda x: (lax.psum(x, "d"), lax.psum(jnp.sin(x), "d")),
        mesh=mesh(4),
        in_specs=P("d"),
        out_specs=P(),
    )
    if traffic(jax.jit(two), jnp.ones((4, C))).number > 1:
        pytest.skip("this XLA does not combine reductions")


def loss(x, scale, bias, mask, axis_name):
    """Not linear in y, so that no part of the backward pass can run with the forward pass."""
    y, stats = batch_norm(
        x, BatchStats.make(x.shape[-1]), scale, bias, train=True, mask=mask, axis_name=axis_name
    )
    return jnp.sum(jnp.sin(y)), (y, stats)


def both_passes(function):
    """The loss with its gradients, and no other output."""
    return jax.grad(lambda *args: function(*args)[0], (0, 1, 2))


def mesh(devices, names=("d",)):
    shape = (devices,) if len(names) == 1 else (devices // 2, 2)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def by_shard_map(devices, backward, *, rows=16, mask=None, dtype=jnp.float32):
    def body(x, scale, bias, *mask):
        local = partial(loss, mask=mask[0] if mask else None, axis_name="d")
        if not backward:
            return local(x, scale, bias)[1]
        whole = both_passes(lambda *args: (lax.psum(local(*args)[0], "d"),))
        return whole(x, scale, bias)

    out = (P("d"), P(), P()) if backward else (P("d"), P())
    data = () if mask is None else (mask,)
    specs = (P("d"), P(), P(), *(P("d") for _ in data))
    sharded = jax.shard_map(body, mesh=mesh(devices), in_specs=specs, out_specs=out)
    return traffic(jax.jit(sharded), jnp.ones((rows, 8, C), dtype), *jnp.ones((2, C)), *data)


def by_pmap(devices, backward, *, rows=16, mask=None, dtype=jnp.float32):
    def body(x, scale, bias, *mask):
        local = partial(loss, mask=mask[0] if mask else None, axis_name="d")
        return both_passes(local)(x, scale, bias) if backward else local(x, scale, bias)[1]

    data = () if mask is None else (mask.reshape(devices, -1, *mask.shape[1:]),)
    axes = (0, None, None, *(0 for _ in data))
    mapped = jax.pmap(body, "d", in_axes=axes, devices=jax.devices()[:devices])
    x = jnp.ones((devices, rows // devices, 8, C), dtype)
    return traffic(mapped, x, *jnp.ones((2, C)), *data)


def by_jit(devices, backward, *, rows=16, mask=None, dtype=jnp.float32, names=("d",), place=("d",)):
    def step(x, scale, bias, mask):
        local = partial(loss, mask=mask, axis_name=None)
        return both_passes(local)(x, scale, bias) if backward else local(x, scale, bias)[1]

    def put(v, place):
        return jax.device_put(v, NamedSharding(mesh(devices, names), P(*place)))

    features = place[2:]
    x, mask = put(jnp.ones((rows, 8, C), dtype), place), mask if mask is None else put(mask, place)
    return traffic(jax.jit(step), x, *(put(v, features) for v in jnp.ones((2, C))), mask)


class Budget(NamedTuple):
    """What one synchronized batch norm may exchange, forward and then backward."""

    forward: int
    forward_bytes: int
    backward: int = 1
    backward_bytes: int = 2 * VECTOR


# Around running means that all devices have, two vectors: the sums of the deviations and of their
# squares. Where types do not prove the running means equal, also the bits of their hash. In jit on
# a CPU three vectors: the mean, then the squares together with the rounding error of the mean. The
# partitioner for CPUs reduces over one mesh axis after the other; for GPUs XLA merges the two.
TRANSFORMATIONS = {
    "shard_map": (by_shard_map, Budget(1, 2 * VECTOR)),
    "pmap": (by_pmap, Budget(1, 2 * VECTOR + HASH)),
    "jit, batch": (by_jit, Budget(2, 3 * VECTOR)),
    "jit, space": (partial(by_jit, place=(None, "d")), Budget(2, 3 * VECTOR)),
    "jit, batch and space": (
        partial(by_jit, names=("a", "b"), place=("a", "b")),
        Budget(2 * 2, 2 * 3 * VECTOR, 2 * 1, 2 * 2 * VECTOR),
    ),
    "jit, features": (partial(by_jit, place=(None, None, "d")), Budget(0, 0, 0, 0)),
    "jit, batch and features": (
        partial(by_jit, names=("a", "b"), place=("a", None, "b")),
        Budget(2, 3 * VECTOR // 2, 1, VECTOR),
    ),
}


def excess(transformation, budget, devices=4, **options):
    """What exceeds the budget of a transformation; empty if nothing does."""
    forward, step = (transformation(devices, backward, **options) for backward in (False, True))
    wrong = [kind for kind in {**forward.kinds, **step.kinds} if kind != "all-reduce"]
    for name, got, most in (
        ("forward", forward, (budget.forward, budget.forward_bytes)),
        (
            "both",
            step,
            (budget.forward + budget.backward, budget.forward_bytes + budget.backward_bytes),
        ),
    ):
        wrong += [(name, got, most)] * (got.number > most[0] or got.bytes > most[1])
    return wrong


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_a_synchronized_batch_norm_keeps_to_its_budget(transformation, devices):
    assert not excess(*TRANSFORMATIONS[transformation], devices)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    "transformation", ["shard_map", "pmap", "jit, batch", "jit, space", "jit, features"]
)
def test_one_collective_is_enough_around_a_running_mean(transformation, platform, monkeypatch):
    monkeypatch.setenv(VARIABLE, platform)
    jax.clear_caches()
    run, budget = TRANSFORMATIONS[transformation]
    # Where features are sharded, one byte says whether to measure again.
    most = min(budget.forward_bytes, 2 * VECTOR + HASH) or 1
    once = budget._replace(forward=1, forward_bytes=most)
    assert not excess(run, once)
    jax.clear_caches()


@pytest.mark.parametrize("transformation", ["shard_map", "pmap", "jit, batch"])
def test_bytes_depend_neither_on_the_batch_nor_on_the_dtype(transformation):
    run, budget = TRANSFORMATIONS[transformation]
    assert not excess(run, budget, rows=64)
    assert not excess(run, budget, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("transformation", "more"), [("shard_map", 0), ("pmap", 0), ("jit, batch", 1)]
)
def test_a_mask_adds_its_count(transformation, more):
    """In the first collective; in jit in a separate one, since the count is an integer."""
    run, budget = TRANSFORMATIONS[transformation]
    for shape, size in (((16, 1, 1), 4), ((16, 8, C), VECTOR)):
        counted = budget._replace(
            forward=budget.forward + more, forward_bytes=budget.forward_bytes + size
        )
        assert not excess(run, counted, mask=jnp.ones(shape, bool))


def test_an_additional_collective_would_be_found():
    def wasteful(devices, backward, extra=lambda x: lax.psum(x, "d")):
        sharded = jax.shard_map(
            lambda x: (synchronize(measure(x, (0, 1)), "d").mean, extra(jnp.sin(x[0, 0]))),
            mesh=mesh(devices),
            in_specs=P("d"),
            out_specs=(P(), P()),
            check_vma=False,
        )
        return traffic(jax.jit(sharded), jnp.ones((16, 8, C)))

    # The mean, its correction and the additional one; m2 is not used.
    assert wasteful(4, False) == ({"all-reduce": 2}, 3 * VECTOR)
    assert excess(wasteful, Budget(2, 2 * VECTOR, 0, 0))
    gather = partial(wasteful, extra=lambda x: lax.all_gather(x, "d"))
    assert "all-gather" in excess(gather, Budget(9, 99 * VECTOR))
    assert excess(gather, Budget(9, 5 * VECTOR)) != excess(gather, Budget(9, 4 * VECTOR))


def test_evaluation_exchanges_nothing():
    stats = BatchStats.make(C)
    served = jax.jit(lambda x: batch_norm(x, stats, train=False)[0])
    x = jax.device_put(jnp.ones((16, 8, C)), NamedSharding(mesh(4), P("d")))
    assert traffic(served, x).number == 0


def test_a_mean_that_is_zero_by_definition_is_not_communicated():
    shared = jax.shard_map(
        lambda x: rms_norm(x, axis_name="d"),
        mesh=mesh(4),
        in_specs=P(None, "d"),
        out_specs=P(None, "d"),
    )
    assert traffic(jax.jit(shared), jnp.ones((16, C))) == ({"all-reduce": 1}, 4 * 16)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_groups_that_are_whole_on_a_device_exchange_nothing(platform, monkeypatch):
    """Except one byte on a GPU or TPU: the shared decision whether to measure again."""
    monkeypatch.setenv(VARIABLE, platform)
    jax.clear_caches()
    step = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(group_norm(x, num_groups=8)))))
    most = int(platform != "cpu")
    for place in ((None, None, "d"), ("d",)):
        # Large enough for a GPU to take a sample.
        x = jax.device_put(jnp.ones((16, 128, C)), NamedSharding(mesh(4), P(*place)))
        found = traffic(step, x)
        assert (found.number, found.bytes) == (most, most)
    jax.clear_caches()


def test_outputs_keep_the_sharding_of_the_input():
    for place in (P("a", "b"), P(None, "a", "b"), P(("a", "b"))):
        x = jax.device_put(jnp.ones((16, 8, C)), NamedSharding(mesh(8, ("a", "b")), place))
        y, stats = jax.jit(partial(batch_norm, train=True))(x, BatchStats.make(C))
        assert y.sharding.is_equivalent_to(x.sharding, 3)
        assert np.shape(stats.mean) == (C,)
