"""Modules of NNX and linen have the same variables and compute the same bits."""

from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import normjax
import normjax.linen
import normjax.nnx

pytestmark = pytest.mark.usefixtures("lenient")
TRAIN, EVALUATE = {"train": True}, {"train": False}


@dataclass(frozen=True)
class Case:
    """A module of either framework, and how it is called."""

    kind: str
    options: dict = field(default_factory=dict)
    mode: dict = field(default_factory=dict)
    shape: tuple = (6, 4, 3)
    features: tuple = (3,)
    inputs: int = 1
    conditional: tuple = ()
    masked: bool = True


def schedule(step):
    return 1.0 + 0.1 * jnp.asarray(step, jnp.float32)


BATCH = {
    "in training": Case("BatchNorm", {"momentum": 0.9}, TRAIN),
    "in evaluation": Case("BatchNorm", {}, EVALUATE),
    "plain average": Case("BatchNorm", {"momentum": None}, TRAIN),
    "plain average, in evaluation": Case("BatchNorm", {"momentum": None}, EVALUATE),
    "debiased": Case("BatchNorm", {"momentum": 0.9, "debias": True}, TRAIN),
    "unbiased": Case("BatchNorm", {"momentum": 0.9, "ddof": 1}, TRAIN),
    "virtual batches": Case("BatchNorm", {"momentum": 0.9, "virtual_batch_size": 2}, TRAIN),
    "several feature axes": Case("BatchNorm", {"axis": (1, -1)}, TRAIN, features=(4, 3)),
    "several feature axes, in evaluation": Case(
        "BatchNorm", {"axis": (1, -1)}, EVALUATE, features=(4, 3)
    ),
    "features first": Case("BatchNorm", {"axis": 1}, TRAIN, features=(4,)),
    "conditional": Case("BatchNorm", {}, TRAIN, conditional=("scale", "bias")),
    "no scale": Case("BatchNorm", {"use_scale": False}, TRAIN),
    "no parameters": Case("BatchNorm", {"use_scale": False, "use_bias": False}, TRAIN),
    "half precision": Case("BatchNorm", {"dtype": jnp.bfloat16}, TRAIN),
    "with an activation": Case("BatchNormAct", {"activation": normjax.ELU()}, TRAIN),
    "with an activation, in evaluation": Case("BatchNormAct", {}, EVALUATE),
    "renorm": Case("BatchRenorm", {"r_max": 1.1, "d_max": 0.2}, TRAIN),
    "renorm by a schedule": Case("BatchRenorm", {"r_max": schedule, "d_max": 0.5}, TRAIN),
}
WITHIN = {
    "LayerNorm": Case("LayerNorm"),
    "LayerNorm, conditional": Case("LayerNorm", conditional=("scale", "bias")),
    "LayerNorm, two axes": Case(
        "LayerNorm", {"reduction_axes": (1, 2), "feature_axes": (1, 2)}, features=(4, 3)
    ),
    "RMSNorm": Case("RMSNorm"),
    "GroupNorm": Case("GroupNorm", {"num_groups": 3}, shape=(2, 4, 6), features=(6,)),
    "GroupNorm, more leading axes": Case(
        "GroupNorm",
        {"num_groups": None, "group_size": 2, "reduction_axes": (-2, -1)},
        shape=(2, 2, 4, 6),
        features=(6,),
    ),
    "InstanceNorm": Case("InstanceNorm"),
    "AddLayerNorm": Case("AddLayerNorm", inputs=2),
    "AddRMSNorm": Case("AddRMSNorm", inputs=2),
    "FilterResponseNorm": Case("FilterResponseNorm"),
    "DynamicTanh": Case("DynamicTanh", masked=False),
    "LocalResponseNorm": Case("LocalResponseNorm", {"size": 3, "alpha": 0.5}, masked=False),
}
WEIGHTS = {
    "WeightNorm": Case("WeightNorm", masked=False),
    "WeightNorm, one length": Case("WeightNorm", {"feature_axes": None}, masked=False),
    "SpectralNorm": Case("SpectralNorm", {"n_steps": 2}, TRAIN, masked=False),
    "SpectralNorm, in evaluation": Case("SpectralNorm", {}, EVALUATE, masked=False),
    "WeightStandardized": Case("WeightStandardized", {"use_gain": True}, masked=False),
    "WeightStandardized, scaled": Case("WeightStandardized", {"scaled": True}, masked=False),
}
CASES = BATCH | WITHIN | WEIGHTS


def both_modules(case):
    """The module of linen and that of NNX."""
    linen, ours = (getattr(package, case.kind) for package in (normjax.linen, normjax.nnx))
    if case in WEIGHTS.values():
        rngs, features = nnx.Rngs(0), case.features[0]
        layer = nnx.Linear(features, 4, rngs=rngs)
        return linen(nn.Dense(4), **case.options), ours(layer, **case.options, rngs=rngs)
    if case.kind == "LocalResponseNorm":
        return linen(**case.options), ours(**case.options)
    return linen(**case.options), ours(np.prod(case.features), **case.options, rngs=nnx.Rngs(0))


def perturbed(leaf, rng):
    """Values other than the initial ones; counts stay integers."""
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.full_like(leaf, 3)
    return jnp.asarray(rng.random(leaf.shape) + 0.5, leaf.dtype)


def name_of_linen(path):
    return path[-1].rsplit("/")[-1]


def name_of_nnx(path):
    """The last part of the path. Wrappers of weights store a whole path as the last key."""
    stored = {"scales": "scale", "gains": "gain"}
    return stored.get(path[0]) or (path[-1][-1] if isinstance(path[-1], tuple) else path[-1])


def of_linen(variables):
    return {name_of_linen(path): leaf for path, leaf in flatten_dict(variables).items()}


def of_nnx(state):
    return {name_of_nnx(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def step_of_linen(module, case):
    def step(variables, given, mask, dy):
        state = {name: tree for name, tree in variables.items() if name != "params"}

        def loss(params, given):
            options = case.mode | ({"mask": mask} if case.masked else {}) | given["named"]
            y, updates = module.apply(
                {"params": params, **state}, *given["x"], mutable=["batch_stats"], **options
            )
            return weighted_sum(y, dy), (y, of_linen({**state, **updates}))

        (_, aux), (params, dgiven) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            variables.get("params", {}), given
        )
        return *aux, of_linen(params), dgiven

    return jax.jit(step)


def step_of_nnx(module, case):
    graph, _, _ = nnx.split(module, nnx.Param, ...)

    def step(params, state, given, mask, dy):
        def loss(params, given):
            options = case.mode | ({"mask": mask} if case.masked else {}) | given["named"]
            module = nnx.merge(graph, params, state, copy=True)
            y = module(*given["x"], **options)
            return weighted_sum(y, dy), (y, of_nnx(nnx.state(module, nnx.BatchStat)))

        (_, aux), (params, dgiven) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, given)
        return *aux, of_nnx(params), dgiven

    return jax.jit(step)


def weighted_sum(y, dy):
    return sum(jnp.sum(dy[..., : leaf.shape[-1]] * leaf) for leaf in jax.tree.leaves(y))


def assert_same(got, want):
    """Compares by name; NNX flattens several feature axes."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(got[name].ravel(), want[name].ravel(), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_linen_and_nnx_agree_to_the_last_bit(rng, name):
    """Outputs, all gradients and updated statistics, with and without a mask."""
    case = CASES[name]
    linen, ours = both_modules(case)
    x = rng.normal(2, 3, (case.inputs, *case.shape)).astype(np.float32)
    dy = rng.normal(size=(*case.shape[:-1], 8)).astype(np.float32)
    vectors = rng.normal(1, 1, (2, case.shape[0], *case.features)).astype(np.float32)
    given = {"x": list(x), "named": dict(zip(case.conditional, vectors, strict=False))}

    variables = linen.init(jax.random.key(0), *x, **case.mode)
    variables = jax.tree.map(lambda leaf: perturbed(leaf, rng), variables)
    flat = of_linen(variables)
    for path, variable in nnx.to_flat_state(nnx.state(ours)):
        variable.set_value(flat[name_of_nnx(path)].reshape(variable.shape))
    _, params, state = nnx.split(ours, nnx.Param, ...)
    assert of_nnx(nnx.state(ours)).keys() == flat.keys()

    masks = [None, rng.random((*case.shape[:-1], 1)) < 0.7] if case.masked else [None]
    theirs, own = step_of_linen(linen, case), step_of_nnx(ours, case)
    for mask in masks:
        y, stats, dparams, dgiven = own(params, state, given, mask, dy)
        want_y, want_stats, want_dparams, want_dgiven = theirs(variables, given, mask, dy)
        jax.tree.map(np.testing.assert_array_equal, (y, dgiven), (want_y, want_dgiven))
        assert_same(stats, want_stats)
        assert_same(dparams, want_dparams)
        moved = [n for n in stats if np.any(stats[n].ravel() != np.asarray(flat[n]).ravel())]
        assert bool(moved) == (case.mode == TRAIN)


def modules(package, base):
    public = {name: getattr(package, name) for name in package.__all__}
    return {n for n, kind in public.items() if isinstance(kind, type) and issubclass(kind, base)}


def test_linen_and_nnx_have_the_same_modules():
    linen, ours = modules(normjax.linen, nn.Module), modules(normjax.nnx, nnx.Module)
    assert linen == ours == {case.kind for case in CASES.values()}
