"""Unbound axes and invalid groups raise an error that says what to do, before any computation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import normjax
from normjax import BatchStats, batch_norm, layer_norm, measure, synchronize
from tests.transformations import entered, mesh

X = np.arange(16, dtype=np.float32).reshape(8, 2)
CALLS = {
    "normjax.synchronize": lambda x, **where: synchronize(measure(x, 0), **where).mean,
    "normjax.batch_norm": lambda x, **where: batch_norm(x, None, train=True, **where)[0],
    "normjax.layer_norm": lambda x, **where: layer_norm(x, **where),
}
every_call = pytest.mark.parametrize("called", CALLS)


def mapped(call, **where):
    return jax.vmap(partial(call, **where), axis_name="batch")(X.reshape(4, 2, 2))


@every_call
def test_an_unbound_axis_is_named_with_the_bound_axes(called):
    with pytest.raises(
        NameError,
        match=f"{called}: axis_name='d' is not bound here; bound are: 'batch'. Bind it with jax",
    ):
        mapped(CALLS[called], axis_name="d")
    with pytest.raises(NameError, match="bound are: none.*Under plain jit.* axis_name=None"):
        jax.jit(partial(CALLS[called], axis_name="d"))(X)


@every_call
def test_a_typo_suggests_the_nearest_name(called):
    with pytest.raises(NameError, match="'bacth' is not bound.* Did you mean 'batch'"):
        mapped(CALLS[called], axis_name="bacth")
    with pytest.raises(NameError, match=r"\('batch', 'bach'\) is not.* Did you mean 'batch'"):
        mapped(CALLS[called], axis_name=("batch", "bach"))


@every_call
def test_a_mesh_axis_given_to_plain_jit_is_not_bound(called):
    message = "'d' is an axis of the mesh, which jit does not bind.* Pass axis_name=None, or map"
    with entered(mesh()), pytest.raises(NameError, match=message):
        jax.jit(partial(CALLS[called], axis_name="d"))(X)


def test_a_typo_under_shard_map_suggests_the_nearest_name():
    """JAX itself raises an AssertionError without a message there."""
    sharded = jax.shard_map(
        partial(CALLS["normjax.batch_norm"], axis_name="data_"),
        mesh=mesh(names=("data",)),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    with pytest.raises(NameError, match="Did you mean 'data'"):
        jax.jit(sharded)(X)


@every_call
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 1]], r"in no group: \[2, 3\]\). Name each index from 0 to 3 in one group"),
        ([[0, 1], [1, 2, 3]], r"in several: \[1\]"),
        ([[0, 1], [2, 4]], r"in no group: \[3\], beyond the axis: \[4\]"),
        ([[0, 1], [2, -1]], r"beyond the axis: \[-1\]"),
        ([[0, 1, 2, 3], []], "one is empty"),
        ([], r"in no group: \[0, 1, 2, 3\]"),
    ],
)
def test_groups_that_do_not_partition_the_axis_are_refused(called, groups, message):
    with pytest.raises(ValueError, match=f"{called}: .* does not divide the 4 devices.*{message}"):
        mapped(CALLS[called], axis_name="batch", axis_index_groups=groups)


@pytest.mark.parametrize("groups", [[0, 1], 3, ["ab", "cd"]])
def test_groups_are_lists_of_lists(groups):
    with pytest.raises(TypeError, match=r"not a list of lists of indices.*\[\[0, 1\], \[2, 3\]\]"):
        mapped(CALLS["normjax.synchronize"], axis_name="batch", axis_index_groups=groups)


def test_groups_without_an_axis_are_refused():
    with pytest.raises(ValueError, match=r"without an axis_name, expected both or neither"):
        batch_norm(X, None, train=True, axis_index_groups=[[0], [1]])


def test_groups_that_jax_does_not_support_are_refused_with_a_remedy():
    with pytest.raises(NotImplementedError, match="jax.vmap has no groups.*or bind two axes"):
        mapped(CALLS["normjax.batch_norm"], axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
    unequal = partial(
        CALLS["normjax.batch_norm"], axis_name="d", axis_index_groups=[[0], [1, 2, 3]]
    )
    sharded = jax.shard_map(unequal, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))
    with pytest.raises(NotImplementedError, match=r"unequal size. Use jax.pmap or .*check_vma=F"):
        jax.jit(sharded)(X)


def test_devices_with_different_features_are_refused():
    """Each process traces its own step, so the one with other features raises."""
    stats, other = BatchStats.make(2), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"stats.mean has shape \(2,\), expected \(3,\)"):
        jax.vmap(lambda x: batch_norm(x, stats, train=True, axis_name="d")[0], axis_name="d")(
            other[None]
        )
    with pytest.raises(ValueError, match=r"merge: .*shapes \[\(2,\), \(3,\)\].*same features"):
        normjax.merge(measure(X, 0), measure(other, 0))
