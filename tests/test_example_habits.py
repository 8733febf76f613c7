"""Examples compile a step once, and check before training that their outputs can be written."""

import importlib
import logging

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import normjax.linen
from tests.kill_and_resume import ROOT

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


class Tiny(nn.Module):
    """A small network like those of the examples."""

    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, images, train, mask=None):
        norm = normjax.linen.BatchNorm(axis_name=self.axis_name)
        x = norm(nn.Conv(2, (1, 1))(images), train=train, mask=mask)
        return nn.Dense(10)(x.mean((1, 2)))


def batch():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 2, 2, 1)).astype(np.float32)
    return images, rng.integers(0, 10, 8), np.arange(8) < 7


def steps(example, name):
    """The state and the step as an example makes them."""
    digits, beside_pmap = example("digits"), example("_beside_pmap")
    devices, optimizer = jax.devices()[:4], digits.make_optimizer(10)
    model = Tiny()
    variables = model.init(jax.random.key(0), batch()[0], train=False)
    state = digits.initial_state(variables, optimizer)
    if name == "digits":
        return digits.on_each_device(state, devices), digits.mapped_step(model, optimizer, devices)
    mesh = Mesh(np.array(devices), ("batch",))
    return beside_pmap.on_mesh(state, mesh), example(name).make_step(model, optimizer, mesh)


@pytest.mark.parametrize("name", ["digits", "shard_map", "sharded_jit"])
def test_the_step_is_compiled_once(example, caplog, name):
    state, step = steps(example, name)
    compiled = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            caplog.clear()
            state, _ = step(state, *batch())
            compiled.append(sum("Compiling" in r.getMessage() for r in caplog.records))
    assert compiled[0] > 0
    assert compiled[1:] == [0, 0]


def test_fine_tuning_is_compiled_once(example, caplog):
    finetune = example("finetune")
    model = Tiny(axis_name=None)
    images, labels, _ = batch()
    variables = model.init(jax.random.key(0), images, False)
    rng = np.random.default_rng(0)
    options = dict(steps=3, size=4, rate=1e-3, rng=rng, title="tiny")

    def tool(apply):
        return lambda variables, images, train, mutable: apply(
            variables, images, train=train, mutable=mutable
        )

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        finetune.fit((model, variables), images, labels, **options, tool=tool)
    assert sum("Compiling jit(step)" in r.getMessage() for r in caplog.records) == 1


@pytest.fixture
def unwritable(tmp_path):
    """A folder that no user can create, since its parent is a file."""
    (tmp_path / "thesis.txt").write_text("years of work")
    return tmp_path / "thesis.txt" / "out"


@pytest.mark.parametrize("name", ["digits", "finetune"])
def test_an_unwritable_picture_is_an_error_before_training(
    example, unwritable, monkeypatch, capsys, name
):
    script = example(name)
    monkeypatch.setattr(script, "load_data", lambda seed: pytest.fail("training has begun"))
    with pytest.raises(SystemExit):
        script.main(["--out", str(unwritable)])
    message = capsys.readouterr().err
    assert f"cannot write {unwritable / name}.png: Not a directory. Name another" in message


def test_a_folder_that_can_be_written_is_left_empty(example, tmp_path):
    example("digits").check_writable(None, tmp_path / "new" / "digits.png")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


@pytest.mark.parametrize("below", [False, True])
def test_unwritable_checkpoints_are_an_error_before_training(example, unwritable, below):
    folder = unwritable if below else unwritable.parent
    with pytest.raises(SystemExit, match=r"cannot write .*thesis.txt.*another folder with --check"):
        example("multihost").main(["--checkpoints", str(folder)])
