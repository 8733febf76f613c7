"""The benchmark tools: the rows and columns of their tables, and their arithmetic."""

import importlib.util
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from benchmarks import accuracy, calls, layers, models, peers, speed, stack, steps, tables

QUICK = ["--repeats", "2", "--seconds", "0"]
LAYER = layers.Layer("tiny", "layer_norm", (4, 8))


@pytest.fixture(autouse=True)
def small(lenient, monkeypatch):
    """Tiny layers; and benchmarks do not clear the caches of the test process."""
    monkeypatch.setattr(speed, "LAYERS", (layers.Layer("tiny", "batch_norm", (4, 2, 8)), LAYER))
    monkeypatch.setattr(calls, "COMPILATIONS", 1)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


def cells(text):
    """The rows of the table in a text, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_a_line_for_each_layer_and_mode(tmp_path, capsys):
    options = ["--dtype", "float32", "--peers", "flax.linen", "--out", str(tmp_path)]
    measured = speed.main([*QUICK, *options])
    assert len(measured) == 2 * 2 * 2  # layers, modes, libraries
    first = cells((tmp_path / "speed.md").read_text().split("## ")[0])
    assert first[0][-2:] == ["GB/s", "flax.linen"]
    assert [line[2] for line in first[2:]] == 3 * ["training step", "evaluation"]
    assert all(float(line[-1]) > 0 for line in first[2:])
    last = cells((tmp_path / "speed.md").read_text().split("## ")[1])
    assert last[0][-3:] == ["kept for backward, MB", "temporary, MB", "compile s"]
    assert len(last) == 2 + len(measured)
    output = capsys.readouterr().out
    assert "geometric mean, training step, float32: flax.linen" in output
    has_picture = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "speed.png").exists() is has_picture
    assert ("There is no picture" in output) is not has_picture


def test_filters_leave_one_row(capsys):
    options = ["--only", "layer_norm", "--dtype", "bfloat16", "--mode", "eval", "--peers", ""]
    with pytest.raises(SystemExit):
        speed.main([*QUICK, *options])
    assert "no such peer: ; there are normjax, flax.linen" in capsys.readouterr().err
    (found,) = speed.main([*QUICK, *options[:-1], "normjax"])
    assert (found.layer, found.dtype) == ("layer_norm tiny (4, 8)", "bfloat16")
    assert (found.mode, found.contender) == ("evaluation", "normjax")


def test_an_unknown_layer_is_an_error_that_lists_the_layers(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--only", "layernorm"])
    assert "layer_norm tiny (4, 8)" in capsys.readouterr().err


def test_a_library_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.peers._haiku", None)
    assert list(speed.installed(["normjax", "haiku"])) == ["normjax"]
    assert "haiku is left out" in capsys.readouterr().out


def test_a_library_that_fails_or_differs_is_left_out(capsys):
    def fails(*_):
        raise RuntimeError("no compiler\nand more")

    def differs(layer, x, dy):
        return peers.load("normjax")(layer, 2 + x * x, dy)

    contenders = {"normjax": peers.load("normjax"), "fails": fails, "differs": differs}
    built = speed.build(contenders, LAYER, "float32", calls.MODES)
    assert {name for name, _ in built} == {"normjax"}
    output = capsys.readouterr().out
    assert "fails is left out of layer_norm tiny (4, 8): RuntimeError: no compiler\n" in output
    assert "differs is left out of layer_norm tiny (4, 8) training step: off by" in output


@pytest.mark.parametrize(
    "layer",
    [
        layers.Layer("tiny", "batch_norm", (4, 4, 4, 8)),
        layers.Layer("tiny", "group_norm", (2, 4, 4, 8), 4),
    ],
    ids=lambda layer: layer.kind,
)
def test_every_library_computes_the_same(layer):
    installed = speed.installed([name for name in peers.PEERS if name != "torch.compile"])
    built = speed.build(installed, layer, "float32", calls.MODES)
    assert set(built) == {(name, mode) for name in installed for mode in calls.MODES}


def test_kept_bytes_counts_what_a_pullback_keeps_once():
    x = jnp.ones((4, 8))
    assert calls.kept_bytes(lambda x: jax.vjp(jnp.sin, x)[1], x) == 4 * 8 * 4
    assert calls.kept_bytes(lambda x: (x, x), x) == 4 * 8 * 4
    assert calls.kept_bytes(lambda x: jax.vjp(lambda x: 2 * x, x)[1], x) == 0


def test_ratios_means_and_floors():
    def measurement(layer, contender, seconds, copy=0.5):
        times = (seconds, seconds, 10.0)
        return tables.Measurement(
            layer, "float32", "evaluation", contender, times, copy, 100, 2, None, None, None
        )

    found = [measurement("a", "normjax", 1.0), measurement("a", "flax.linen", 2.0)]
    found += [measurement("b", "normjax", 1.0), measurement("b", "flax.linen", 8.0)]
    rows = tables.rows_of(found)
    assert [row.ratios("normjax") for row in rows] == [{"flax.linen": 2.0}, {"flax.linen": 8.0}]
    means = tables.grouped_means(rows, "normjax")
    assert means[("evaluation", "float32")]["flax.linen"] == pytest.approx(4.0)
    assert found[0].over_floor == 2.0
    assert found[0].bandwidth == 200.0
    assert layers.Layer("", "batch_norm", (4, 4)).tensors_moved("training step") == 8
    assert LAYER.tensors_moved("training step") == 5
    assert LAYER.tensors_moved("evaluation") == 2


def test_models_and_stacks_are_compared_from_the_same_variables(tmp_path):
    x = np.random.default_rng(0).normal(0, 1, (2, 8, 8, 4))
    variants = {
        name: lambda dtype, norm=norm: stack.Stack(
            stack.block(stack.Block, norm)(nn.elu, jnp.dtype(dtype)), 2
        )
        for name, norm in (("flax", nn.BatchNorm), ("normjax", normjax.linen.BatchNorm))
    }
    found = steps.compare("stack", variants, x, "float32", 2, 0.0)
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    assert 0 < steps.difference(found[1].gradients, found[0].gradients) < 1e-5
    assert (
        steps.difference(jax.tree.map(jnp.zeros_like, found[0].gradients), found[0].gradients) == 1
    )
    written = cells("\n".join(steps.table(found)))
    assert [line[2] for line in written[2:]] == ["flax", "normjax"]
    assert written[2][4] == written[2][6] == written[2][8] == "1.00"


def test_resnet_takes_both_norms():
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    trees = []
    for make in models.MODELS["ResNet-50, 8 images of 64 x 64"][0].values():
        trees.append(jax.eval_shape(make("float32").init, jax.random.key(0), image))
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    assert sum(leaf.size for leaf in jax.tree.leaves(trees[0]["params"])) == 25_557_032


def test_every_adapter_is_listed():
    folder = importlib.import_module("benchmarks.peers").__path__[0]
    adapters = {adapter for adapter, _, _ in peers.PEERS.values()}
    assert adapters == {path.stem for path in Path(folder).glob("_[a-z]*.py")}


def test_errors_of_the_forms_are_reported_with_their_input(monkeypatch):
    monkeypatch.setattr(accuracy, "LENGTHS", (64,))
    monkeypatch.setattr(accuracy.hard, "CASES", ["layer"])
    units, quantity, *name = accuracy.worst("layer", 64).replace("(", "").split(maxsplit=2)
    assert 0 < float(units) <= 16
    assert quantity.rstrip(",") in ("y", "var", "dx")
    assert "".join(name).rstrip(")") in accuracy.hard.inputs(64)
    forms = {"cpu": {"units": {"layer|64": "1.0 (y)"}}, "gpu": {"units": {"layer|64": "2.0 (y)"}}}
    written = cells("\n".join(accuracy.in_units(forms)))
    assert written[0] == ["norm", "entries", "CPU", "GPU"]
    assert written[2] == ["layer norm", "64", "1.0 (y)", "2.0 (y)"]
