"""Drop-ins for the norms of flax.nnx: arguments, states, results, and where Flax is wrong."""

import importlib.util
import inspect
import os
import unittest
from functools import partial
from itertools import product
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax.linen
import normjax.nnx
from tests import reference
from tests.reference import EPS

pytestmark = pytest.mark.usefixtures("lenient")
PACKAGES = (nnx, normjax.nnx)
MASKED = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
WRAPPERS = ("WeightNorm", "SpectralNorm")
every_drop_in = pytest.mark.parametrize("name", [*MASKED, *WRAPPERS])


def built(package, name, seed=0, **options):
    """The norm of a package for six features, or around a layer with six inputs."""
    rngs = nnx.Rngs(seed)
    layer = options.pop("layer", {})
    first = nnx.Linear(6, 4, rngs=rngs, **layer) if name in WRAPPERS else 6
    groups = {"num_groups": 3} if name == "GroupNorm" else {}
    return getattr(package, name)(first, **groups, **options, rngs=rngs)


def values(module):
    """(type, value) by path, of variables and of arrays that are not variables."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {path: (type(leaf), leaf[...]) for path, leaf in flat}


@every_drop_in
@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_signatures_contain_those_of_flax(name, method):
    flax, ours = (
        inspect.signature(getattr(getattr(package, name), method)).parameters
        for package in PACKAGES
    )
    # The order of keyword-only parameters does not matter.
    by_position = [n for n, p in flax.items() if p.kind is not p.KEYWORD_ONLY]
    assert list(ours)[: len(by_position)] == by_position
    assert set(flax) <= set(ours)
    for parameter in flax.values():
        own = ours[parameter.name]
        assert own.kind == parameter.kind
        if parameter.name.endswith("_metadata"):
            assert not parameter.default
            assert not own.default
        else:
            assert own.default is parameter.default or own.default == parameter.default
    for added in set(ours) - set(flax):
        assert ours[added].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


@every_drop_in
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_states_equal_those_of_flax(name, dtype):
    normal = nnx.initializers.normal()
    random = {} if name in WRAPPERS else {"scale_init": normal, "bias_init": normal}
    if name == "RMSNorm":
        del random["bias_init"]
    flax, ours = (
        values(built(package, name, seed=3, param_dtype=dtype, **random)) for package in PACKAGES
    )
    assert list(ours) == list(flax)
    for path, (kind, value) in flax.items():
        own_kind, own = ours[path]
        if path[0] == "scales":
            # Plain arrays in Flax, and float32 whatever param_dtype is.
            assert (kind, own_kind) == (type(value), nnx.Param)
            assert (value.dtype, own.dtype) == (np.float32, dtype)
        else:
            assert own_kind is kind
            assert own.dtype == value.dtype
        np.testing.assert_array_equal(own, value)


@pytest.mark.parametrize("name", MASKED)
def test_metadata_of_parameters_equal_those_of_flax(name):
    flax, ours = (built(package, name, scale_metadata={"tag": "a"}) for package in PACKAGES)
    assert ours.scale.get_metadata() == flax.scale.get_metadata()
    assert ours.scale.tag == "a"


@every_drop_in
def test_disabled_parameters_are_none_as_in_flax(name):
    for package in PACKAGES:
        module = built(package, name, **({} if name == "SpectralNorm" else {"use_scale": False}))
        missing = {"WeightNorm": "scales", "SpectralNorm": "error_on_non_matrix"}
        assert not getattr(module, missing.get(name, "scale"))


def randomized(module, rng):
    """Random values for all variables, positive because variances have to be."""
    state = nnx.state(module)
    return jax.tree.map(lambda v: jnp.asarray(rng.random(v.shape) + 0.5, v.dtype), state)


@every_drop_in
def test_states_load_in_both_directions_and_outputs_agree(rng, name):
    """Neighbors differ and values are small, so that Flax's fast variance is accurate."""
    i, j, k = np.indices((4, 4, 6))
    x = ((i + 2 * j + 3 * k) % 5 - 2 + rng.random(i.shape) / 4).astype(np.float32)
    mask = (i + j + k) % 4 != 0
    masks = [{}, {"mask": mask}] if name in MASKED else [{}]
    modes = [{}, {"use_running_average": True}] if name == "BatchNorm" else [{}]
    if name == "SpectralNorm":
        modes = [{"update_stats": True}, {"update_stats": False}]
    for source, target in (PACKAGES, PACKAGES[::-1]):
        modules = built(source, name), built(target, name, seed=5)
        nnx.update(modules[0], randomized(modules[0], rng))
        nnx.update(modules[1], nnx.state(modules[0]))
        assert list(values(modules[0])) == list(values(modules[1]))
        parts = [nnx.split(module) for module in modules]

        @jax.jit
        def run(states, x, parts=parts):
            found = []
            for (graph, _), state in zip(parts, states, strict=True):
                for options in [{**mode, **given} for mode in modes for given in masks]:
                    module = nnx.merge(graph, state, copy=True)
                    y = module(x, **options)
                    found.append((y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))))
            return found

        found = run([state for _, state in parts], x)
        half = len(found) // 2
        close = partial(np.testing.assert_allclose, atol=64 * EPS["float32"])
        jax.tree.map(close, found[half:], found[:half])


DTYPES = ("float32", "bfloat16", "float16")
HALF = DTYPES[1:]
# The dtypes of x, dtype and param_dtype.
COMBINATIONS = list(product(DTYPES, (None, *DTYPES), DTYPES))
DIFFER = {
    # The scales of Flax are always float32, and so are the results.
    "WeightNorm": {(half, None, half) for half in HALF},
    # Flax stores the normalized weights in their own dtype, and ignores the argument dtype.
    "SpectralNorm": {(half, d, half) for half in HALF for d in DTYPES if d != half},
}


@every_drop_in
@pytest.mark.filterwarnings("ignore:scatter inputs")
def test_outputs_have_the_dtype_of_flax(name):
    def outputs(package):
        for x, dtype, param in COMBINATIONS:
            # The layer inside of a wrapper has a dtype of its own, by default none.
            layer = {"layer": {"param_dtype": param}} if name in WRAPPERS else {}
            module = built(package, name, dtype=dtype, param_dtype=param, **layer)
            yield module(jnp.ones((4, 3, 6), x))

    flax, ours = (jax.eval_shape(lambda h=package: list(outputs(h))) for package in PACKAGES)
    differ = {a for a, y, own in zip(COMBINATIONS, flax, ours, strict=True) if y.dtype != own.dtype}
    assert differ == DIFFER.get(name, set())


def errors(outputs, want):
    """The largest error of Flax and of ours, in the order of PACKAGES."""
    return [np.max(np.abs(np.asarray(y, np.float64) - want)) for y in outputs]


def test_flax_rounds_running_statistics_to_the_dtype_of_the_result(rng):
    """bfloat16 rounds a mean of 100.3 to three digits; x is exact in bfloat16."""
    x = jnp.asarray(rng.normal(100, 1, (8, 6)), jnp.bfloat16).astype(jnp.float32)
    outputs = []
    for package in PACKAGES:
        norm = built(package, "BatchNorm", dtype=jnp.bfloat16, use_running_average=True)
        norm.mean[...] = jnp.full(6, 100.3)
        outputs.append(norm(x))
    want = (np.asarray(x, np.float64) - np.float32(100.3)) / np.sqrt(1 + 1e-5)
    flax, ours = errors(outputs, want)
    # bfloat16 numbers near 100 are 0.5 apart, and 100.3 is 0.2 away from the nearest.
    assert flax > 0.19
    assert ours <= EPS["bfloat16"] * np.max(np.abs(want))


def test_flax_groups_the_wrong_entries_with_more_leading_axes(rng):
    x = rng.normal(size=(2, 3, 4, 6)).astype(np.float32) * np.arange(1, 7)
    cut = x.reshape(2, 3, 4, 3, 2)
    want = reference.standardized(cut, 1.0, 0.0, cut, axes=(2, 4), epsilon=1e-6).y
    options = {"reduction_axes": (-2, -1)}
    flax, ours = errors(
        [built(package, "GroupNorm", **options)(x) for package in PACKAGES], want.reshape(x.shape)
    )
    assert flax > 0.1
    assert ours < 16 * EPS["float32"] * np.max(np.abs(want))


def test_flax_overwrites_the_kernel_under_weight_norm(rng):
    x = rng.normal(size=(3, 6)).astype(np.float32)
    for package in PACKAGES:
        module = built(package, "WeightNorm")
        before = np.asarray(module.layer_instance.kernel[...])
        module(x)
        kept = np.array_equal(module.layer_instance.kernel[...], before)
        assert kept == (package is normjax.nnx)


def test_flax_has_no_gradient_for_the_lengths_of_weight_norm(rng):
    x = rng.normal(size=(3, 6)).astype(np.float32)
    dy = rng.normal(size=(3, 4)).astype(np.float32)
    found = []
    for package in PACKAGES:
        module = built(package, "WeightNorm")
        kernel = np.asarray(module.layer_instance.kernel[...], np.float64)
        gradient = nnx.grad(lambda module: jnp.sum(dy * module(x)))(module)
        found.append(dict(nnx.to_flat_state(gradient)))
    lengths = ("scales", ("kernel",))
    flax, ours = found
    assert lengths not in flax
    assert ("layer_instance", "kernel") in flax
    direction = kernel / np.sqrt((kernel**2).sum(0))
    want = ((x.astype(np.float64).T @ dy) * direction).sum(0)
    np.testing.assert_allclose(ours[lengths][...], want, atol=64 * EPS["float32"])


def on_devices(package, x, mask):
    """y and running statistics after a step in which each device has one entry of x."""
    graph, state = nnx.split(built(package, "BatchNorm", axis_name="d", momentum=0.0))

    def step(x, mask):
        module = nnx.merge(graph, state, copy=True)
        return module(x, mask=mask), module.mean[...], module.var[...]

    return [np.asarray(leaf) for leaf in jax.jit(jax.vmap(step, axis_name="d"))(x, mask)]


def test_flax_shares_a_mean_of_means_where_masks_differ(rng):
    x = rng.normal(size=(2, 8, 6)).astype(np.float32) + np.array([0, 3], np.float32)[:, None, None]
    mask = np.ones((2, 8, 1), bool)
    mask[1, 2:] = False
    want = reference.batch_norm(x, axes=(0, 1), mask=mask)
    (_, _, flax), (y, mean, var) = (on_devices(package, x, mask) for package in PACKAGES)
    assert np.max(np.abs(flax[0] - want.var)) > 0.3
    close = partial(np.testing.assert_allclose, atol=64 * EPS["float32"])
    close(y, want.y)
    for device in range(2):
        close(mean[device], want.mean)
        close(var[device], want.var)


def test_flax_shares_nan_where_a_device_has_no_valid_row(rng):
    x = rng.normal(size=(2, 8, 6)).astype(np.float32)
    mask = np.arange(2)[:, None, None] < np.ones((8, 1))
    (_, _, flax), (_, _, ours) = (on_devices(package, x, mask) for package in PACKAGES)
    assert np.isnan(flax).all()
    want = reference.batch_norm(x[0], axes=(0,))
    np.testing.assert_allclose(ours[0], want.var, atol=64 * EPS["float32"])


def test_flax_lets_nan_of_a_masked_entry_reach_every_gradient(rng):
    x, dy = rng.normal(size=(2, 8, 6)).astype(np.float32)
    mask = np.arange(8)[:, None] < 5
    x[5:] = np.nan
    found = []
    for package in PACKAGES:
        graph, state = nnx.split(built(package, "BatchNorm"))

        def loss(x, graph=graph, state=state):
            y = nnx.merge(graph, state, copy=True)(x, mask=mask)
            return jnp.sum(jnp.where(mask, dy * y, 0))

        found.append(jax.jit(jax.grad(loss))(x))
    flax, ours = found
    assert np.isnan(flax).all()
    want = reference.batch_norm(x, dy=np.where(mask, dy, 0), axes=(0,), mask=mask)
    np.testing.assert_allclose(ours, want.dx, atol=64 * EPS["float32"])


def test_flax_statistics_of_a_feature_without_an_entry_are_nan(rng):
    x = rng.normal(size=(8, 6)).astype(np.float32)
    mask = np.arange(6) != 2
    flax, ours = (built(package, "BatchNorm", momentum=0.9) for package in PACKAGES)
    y = [module(x, mask=mask[None]) for module in (flax, ours)]
    assert np.isnan([flax.mean[2], flax.var[2], y[0][0, 2]]).all()
    # Running statistics stay at their start, 0 and 1, where nothing was measured.
    want = reference.batch_norm(x, axes=(0,), mask=mask[None])
    close = partial(np.testing.assert_allclose, atol=16 * EPS["float32"])
    close(ours.mean[...], 0.1 * want.mean)
    close(ours.var[...], np.where(mask, 0.9 + 0.1 * want.var, 1))
    assert np.isfinite(y[1]).all()


def test_flax_statistics_of_an_example_without_an_entry_are_nan(rng):
    """Instance norm over no axis: a masked entry is the only one of its instance."""
    x = rng.normal(size=(4, 6)).astype(np.float32)
    mask = np.arange(6) % 2 == 0
    flax, ours = (built(package, "InstanceNorm")(x, mask=mask[None]) for package in PACKAGES)
    assert np.isnan(np.asarray(flax)[:, ~mask]).all()
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(np.asarray(ours)[:, mask], 0)


def test_flax_group_norm_by_its_fast_variance_is_off():
    """Two entries a group, one of them close to the other: E[x^2] - E[x]^2 has few digits left.

    The input is that of Flax's own suite.
    """
    x = jax.random.normal(jax.random.key(0), (10, 6))
    cut = np.asarray(x).reshape(10, 3, 2)
    want = reference.standardized(cut, 1.0, 0.0, cut, axes=(2,), epsilon=1e-6).y
    modules = [nn.GroupNorm(3), normjax.linen.GroupNorm(3)]
    outputs = [module.apply(module.init(jax.random.key(1), x), x) for module in modules]
    outputs.append(built(normjax.nnx, "GroupNorm")(x))
    flax, *ours = errors(outputs, want.reshape(x.shape))
    assert flax > 64 * EPS["float32"]
    # 1 + |mean| / deviation is 60 for the closest two.
    assert max(ours) < EPS["float32"] * 60
    assert flax > 4 * max(ours)


def own_suite(monkeypatch, *replacements):
    """Runs Flax's suite with our modules in place of its own; returns failures by case."""
    path = os.environ.get("NORMJAX_FLAX_NNX_TESTS")
    if not path:
        pytest.skip("NORMJAX_FLAX_NNX_TESTS is not set to flax/tests/nnx/nn/normalization_test.py")
    for flax, ours in replacements:
        for name in ours.__all__:
            if hasattr(flax, name):
                monkeypatch.setattr(flax, name, getattr(ours, name))
    spec = importlib.util.spec_from_file_location("flax_nnx_test", Path(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(module.TestLinenConsistency)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun == 108
    prefix = "test_nnx_linen_"
    failed = {
        test.id().split(" ")[0].rsplit(prefix, 1)[-1]: why
        for test, why in result.failures + result.errors
    }
    return {name.replace("_equivalence", " "): why for name, why in failed.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flax_own_nnx_suite_passes_with_our_modules(monkeypatch):
    """`NORMJAX_FLAX_NNX_TESTS=.../flax/tests/nnx/nn/normalization_test.py`, of Flax's version.

    The suite requires equal bits in linen and NNX, so our modules replace both.
    """
    failed = own_suite(monkeypatch, (nnx, normjax.nnx), (nn, normjax.linen))
    assert not failed, "\n".join(failed.values())


# Cases in which our modules, in place of flax.nnx alone, differ from flax.linen, and the test that
# shows why. The odd cases have a mask.
DISAGREE = {
    **{
        f"batchnorm {i}": "test_flax_statistics_of_a_feature_without_an_entry_are_nan"
        for i in range(1, 16, 2)
    },
    **{
        f"instancenorm {i}": "test_flax_statistics_of_an_example_without_an_entry_are_nan"
        for i in range(1, 16, 2)
    },
    "groupnorm 0": "test_flax_group_norm_by_its_fast_variance_is_off",
    "groupnorm 4": "test_flax_group_norm_by_its_fast_variance_is_off",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flax_own_nnx_suite_agrees_with_our_nnx_modules_alone(monkeypatch):
    def close(got, want):
        got, want = np.asarray(got), np.asarray(want)
        unit = EPS[want.dtype.name]
        np.testing.assert_allclose(
            got.astype(np.float64), want.astype(np.float64), rtol=8 * unit, atol=8 * unit
        )

    monkeypatch.setattr(np.testing, "assert_array_equal", close)
    failed = own_suite(monkeypatch, (nnx, normjax.nnx))
    assert set(failed) == set(DISAGREE), "\n".join(failed.values())
    assert set(DISAGREE.values()) <= set(globals())
