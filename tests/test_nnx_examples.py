"""The NNX example runs in its short mode, and its step equals that of linen up to rounding."""

import importlib
import logging
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import kill_and_resume

ROOT = kill_and_resume.ROOT


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("batch",))


def batch(dtype):
    """Random images, four for each device; three of the last device are padding."""
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(16, 8, 8, 1)).astype(dtype)
    return images, rng.integers(0, 10, 16), np.arange(16) < 13


def renamed(tree):
    """The arrays of linen by the names of NNX: `Conv_0` is `conv0`, `BatchNorm_0` is `norm0`."""
    names = {"Conv": "conv", "BatchNorm": "norm", "Dense": "dense"}
    layers = {tuple(layer.split("_")): arrays for layer, arrays in tree.items()}
    return {names[kind] + number: arrays for (kind, number), arrays in layers.items()}


def on_rows(mesh, given):
    return jax.device_put(given, NamedSharding(mesh, PartitionSpec("batch")))


@pytest.mark.slow
def test_the_example_runs():
    """The example asserts its claims itself, so it only has to finish."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "examples/nnx_digits.py", "--smoke"],
        cwd=ROOT,
        env=kill_and_resume.ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
        timeout=kill_and_resume.LIMIT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "resumed halfway, largest difference: 0.0" in ran.stdout
    assert "batches of 8, sorted by label" in ran.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("lenient", "x64")
def test_a_step_equals_that_of_linen(example, mesh):
    """linen uses pmap with a named axis, NNX a sharded jit, both with the same initial values.

    A step of SGD with rate 1 changes parameters by the gradient. The results are sums over at most
    n rows and pixels, in two orders: they differ by n eps of their terms.
    """
    digits, nnx_digits = example("digits"), example("nnx_digits")
    sgd = optax.sgd(1.0)
    given = batch(np.float64)

    linen = digits.ResidualNet(momentum=0.9)
    variables = linen.init(jax.random.key(0), given[0][:1], train=False)
    variables = jax.tree.map(np.float64, variables)
    devices = list(mesh.devices)
    start = digits.on_each_device(digits.initial_state(variables, sgd), devices)
    state, loss = digits.mapped_step(linen, sgd, devices)(start, *given)
    want = jax.tree.map(lambda leaf: np.asarray(leaf[0]), (*state[:2], loss))

    model, optimizer = nnx_digits.create(1, 0.9, sgd, mesh)
    before = tuple(renamed(variables[name]) for name in ("params", "batch_stats"))
    for values in before:
        nnx.update(model, values)
    loss = nnx_digits.train_step(model, optimizer, *on_rows(mesh, given))
    after = [nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat)]
    got = jax.tree.map(np.asarray, (*after, loss))

    want = (renamed(want[0]), renamed(want[1]), want[2])
    n = given[0].size
    eps = np.finfo(np.float64).eps

    def compare(path, want, got):
        assert got.dtype == want.dtype
        atol = n * eps * np.max(np.abs(want))
        np.testing.assert_allclose(got, want, 0, atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, want, got)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before, got[:2])
    assert min(jax.tree.leaves(moved)) > 1e-3, "each parameter and statistic must change"


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
def test_the_step_is_compiled_once(example, mesh, caplog):
    """A second network, such as a restored one, is not compiled again; all state is replicated."""
    nnx_digits = example("nnx_digits")
    transformation = optax.adam(1e-3)
    given = on_rows(mesh, batch(np.float32))
    trainings = [nnx_digits.create(seed, 0.9, transformation, mesh) for seed in range(2)]
    compiled = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for training in trainings * 2:
            caplog.clear()
            nnx_digits.train_step(*training, *given)
            compiled.append(sum("Compiling" in r.getMessage() for r in caplog.records))
    assert compiled[0] > 0
    assert compiled[1:] == [0, 0, 0]
    for leaf in jax.tree.leaves(nnx_digits.state_of(*training)):
        assert leaf.sharding.is_fully_replicated
