"""Modules accept what Flax accepts, with the same results; errors contain the messages of Flax."""

import importlib.util
import os
import unittest
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from tests import reference
from tests.reference import EPS

pytestmark = pytest.mark.usefixtures("lenient")
KEY = jax.random.key(0)
EVALUATION = {"use_running_average": True}

# Reductions over one element or over no axis, no feature axis, every axis a feature.
EDGES = [
    ("InstanceNorm", {"feature_axes": (1, 2, 3)}, (2, 3, 2, 2), {}),
    ("InstanceNorm", {}, (4, 3), {}),
    ("InstanceNorm", {"feature_axes": ()}, (2, 3, 4), {}),
    ("LayerNorm", {"reduction_axes": ()}, (4, 3), {}),
    ("LayerNorm", {"feature_axes": ()}, (4, 3), {}),
    ("LayerNorm", {}, (4, 1), {}),
    ("LayerNorm", {"reduction_axes": (), "feature_axes": ()}, (), {}),
    ("RMSNorm", {"reduction_axes": ()}, (4, 3), {}),
    ("RMSNorm", {"feature_axes": ()}, (3,), {}),
    ("GroupNorm", {"num_groups": 3}, (3,), {}),
    ("GroupNorm", {"num_groups": 3, "reduction_axes": -1}, (4, 2, 3), {}),
    ("BatchNorm", {"axis": ()}, (4, 3), {"use_running_average": False}),
    ("BatchNorm", {"axis": (0, 1)}, (4, 3), EVALUATION),
    ("BatchNorm", {}, (3,), EVALUATION),
    ("BatchNorm", {"axis": ()}, (), EVALUATION),
]


@pytest.mark.parametrize(("name", "options", "shape", "mode"), EDGES)
def test_edge_cases_that_flax_accepts_have_its_results(rng, name, options, shape, mode):
    x = jnp.asarray(rng.normal(1, 2, shape), jnp.float32)
    flax, ours = (getattr(library, name)(**options) for library in (nn, normjax.linen))
    variables = jax.tree.map(lambda v: v + np.float32(0.5), ours.init(KEY, x, **mode))
    want = flax.apply(variables, x, mutable=["batch_stats"], **mode)

    @jax.jit
    @jax.grad
    def gradient(x):
        return ours.apply(variables, x, mutable=["batch_stats"], **mode)[0].sum()

    got = ours.apply(variables, x, mutable=["batch_stats"], **mode)
    # Sums over twelve entries at most.
    jax.tree.map(partial(np.testing.assert_allclose, atol=40 * EPS["float32"]), got, want)
    assert np.isfinite(gradient(x)).all()


def test_one_example_under_vmap_is_an_example_of_the_batch(rng):
    """Rank 1: the only axis to reduce is that of the examples, which vmap names."""
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    module = normjax.linen.BatchNorm(axis_name="examples", momentum=0.0)
    variables = module.init(KEY, x[0], train=True)

    def train(x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    y, updates = jax.vmap(train, axis_name="examples")(x)
    want = reference.batch_norm(x, axes=(0,))
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"][0], want.var, rtol=1e-5)


def norm(name, *args, **options):
    """A function from library to the error message of its module."""

    def raised(library):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            getattr(library, name)(*args, **options).init(KEY, jnp.ones((2, 3, 4)))
        return str(error.value)

    return raised


def spectral(library):
    wrapped = library.SpectralNorm(nn.Conv(3, (2,)), error_on_non_matrix=True)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        wrapped.init(KEY, jnp.ones((1, 4, 2)), update_stats=False)
    return str(error.value)


RAISED = {
    "instance norm over the batch": norm("InstanceNorm", feature_axes=(1, -3)),
    "groups that do not divide": norm("GroupNorm", 3),
    "no groups": norm("GroupNorm", 0),
    "a group size that does not divide": norm("GroupNorm", None, 3),
    "groups and a group size": norm("GroupNorm", 2, 2),
    "neither": norm("GroupNorm", None),
    "group norm without its features": norm("GroupNorm", 2, reduction_axes=(0, 1)),
    "no mode": norm("BatchNorm"),
    "spectral norm of more than a matrix": spectral,
}


@pytest.mark.parametrize("name", RAISED)
def test_an_error_contains_the_message_of_flax_and_more(name):
    flax, ours = (RAISED[name](library) for library in (nn, normjax.linen))
    assert ours.startswith("normjax.")
    assert flax in ours
    assert len(ours) > len(flax) + 60


def test_two_modes_are_an_error_with_the_message_of_flax():
    messages = []
    for library in (nn, normjax.linen):
        with pytest.raises(ValueError, match="Should be passed just once") as error:
            library.BatchNorm(True).init(KEY, jnp.ones((2, 3)), True)
        messages.append(str(error.value))
    assert messages[0] in messages[1]


@pytest.mark.parametrize(("axes", "names"), [((), {"kernel"}), ((), {"bias"}), (0, {"bias"})])
def test_weight_norm_of_no_feature_axis_is_that_of_flax(rng, axes, names):
    x = rng.normal(size=(2, 3)).astype(np.float32)
    flax, ours = (
        library.WeightNorm(nn.Dense(2), feature_axes=axes, variable_filter=names)
        for library in (nn, normjax.linen)
    )
    variables = jax.tree.map(lambda v: v + 0.5, ours.init(KEY, x))
    want = flax.apply(variables, x)
    np.testing.assert_allclose(ours.apply(variables, x), want, rtol=16 * EPS["float32"])


def test_training_with_spectral_norm_equals_that_of_flax(rng):
    """Biases of rank 2, as attention has them, start at zero and are no matrix to normalize."""
    x, target = rng.normal(size=(2, 2, 3)).astype(np.float32)
    ends = []
    for library in (nn, normjax.linen):
        # Kernel of shape (3, 2, 3), bias of shape (2, 3).
        model = library.SpectralNorm(nn.DenseGeneral((2, 3)))
        variables = model.init(KEY, x, update_stats=False)

        @jax.jit
        def step(variables, model=model):
            def loss(params):
                y, updates = model.apply(
                    {**variables, "params": params}, x, update_stats=True, mutable=["batch_stats"]
                )
                return jnp.mean((y - target[:, None]) ** 2), updates

            params = variables["params"]
            (value, updates), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
            return {"params": params, **updates}, value

        losses = []
        for _ in range(5):
            variables, value = step(variables)
            losses.append(float(value))
        assert losses == sorted(losses, reverse=True)
        assert not np.any(variables["batch_stats"]["layer_instance/bias/u"])
        ends.append((variables, losses))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), *ends)


# Cases of flax.linen's NormalizationTest that an accurate norm cannot pass, and the tests that show
# it.
EXCEPTIONS = {"test_instance_norm3": "test_float32_far_from_zero_is_not_known_to_1e_6"}


def test_float32_far_from_zero_is_not_known_to_1e_6():
    """Flax's suite compares with mean and variance in float32, and asks for 1e-6 at 1e4 +- 1.

    There float32 numbers are 1e-3 apart and so are means of them: that reference is 1e-3 off
    itself, 1000 times what is asked. Ours is nearer to float64.
    """
    x = jax.random.normal(jax.random.split(KEY)[0], (2, 3, 4, 5)) + 1e4

    @jax.jit
    def one_liner(x):
        mean, var = (f(x, axis=(1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        return (x - mean) * jax.lax.rsqrt(var + 1e-5)

    theirs, ours = one_liner(x), normjax.instance_norm(x, epsilon=1e-5)
    want = reference.batch_norm(np.asarray(x), axes=(1, 2), epsilon=1e-5).y
    their_error, our_error = (
        np.max(np.abs(np.asarray(y, np.float64) - want)) for y in (theirs, ours)
    )
    assert their_error > 500e-6
    assert our_error < their_error
    # The promise: a small multiple of eps (1 + |mean| / deviation), here 1.
    assert our_error < EPS["float32"] * (1 + 1e4 / np.std(np.asarray(x), (1, 2)).min())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flax_own_suite_passes_with_our_modules(monkeypatch):
    """`NORMJAX_FLAX_TESTS=.../flax/tests/linen/linen_test.py`, a checkout of Flax's version."""
    path = os.environ.get("NORMJAX_FLAX_TESTS")
    if not path:
        pytest.skip("NORMJAX_FLAX_TESTS names no checkout of flax/tests/linen/linen_test.py")
    for name in normjax.linen.__all__:
        if hasattr(nn, name):
            monkeypatch.setattr(nn, name, getattr(normjax.linen, name))
    spec = importlib.util.spec_from_file_location("flax_linen_test", Path(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(module.NormalizationTest)
    result = unittest.TestResult()
    suite.run(result)
    failed = {
        test.id().split(" ")[0].rsplit(".", 1)[-1]: why
        for test, why in result.failures + result.errors
    }
    assert set(failed) == set(EXCEPTIONS), "\n".join(failed.values())
    assert result.testsRun - len(failed) >= 56
