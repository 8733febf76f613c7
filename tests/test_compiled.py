"""Costs of norms on accelerators: a bound on a described TPU, and the report of `make compiled`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compiled, compiled_picture, compiled_tables, described, hlo
from benchmarks.calls import EVALUATION, TRAINING
from benchmarks.compiled_tables import BLOCK, Cost
from benchmarks.layers import Layer

ROOT = Path(__file__).parents[1]
# Least ratio of Flax's cycles to ours. Two percent allow for fusions that vary with the compiler.
LEAST_RATIO = 0.98
# It takes a minute; this only bounds a hang.
LIMIT = 600
TINY = Layer("tiny", "batch_norm", (8, 2, 2, 4))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install --no-deps libtpu)",
)
def test_no_norm_costs_more_cycles_on_a_tpu_than_that_of_flax():
    # A separate process, since tests/conftest.py changes the settings of JAX and libtpu does not
    # know the flags of a CPU.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.cycles"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 5 * 2 + 1
    ratios = {title: flax / own for title, (own, flax) in found.items()}
    slower = [f"{ratio:.3f} {title}" for title, ratio in ratios.items() if ratio < LEAST_RATIO]
    assert not slower, "\n".join(["Flax's cycles over ours:", *slower])


def cost(library, value, row="layer_norm a", mode=EVALUATION, platform="gpu", **other):
    defaults = dict(kernels=2, temporary=0.5, conditionals=0, collectives=())
    return Cost(platform, row, "float32", mode, library, value, **{**defaults, **other})


COSTS = [
    cost("normjax", 2.0),
    cost("flax.linen", 4.0),
    cost("haiku", 3.0),
    cost("normjax", 4.0, "layer_norm b"),
    cost("flax.linen", 2.0, "layer_norm b"),
    cost("normjax", 9.0, mode=TRAINING, collectives=(("all-gather", 1), ("all-reduce", 2))),
    cost("normjax", 5000.0, "2 blocks", BLOCK, "tpu"),
    cost("flax.linen", 4000.0, "2 blocks", BLOCK, "tpu"),
]
NAMES = {"gpu": "H100", "tpu": "TPU v5e"}


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_ratios_are_of_the_rows_that_both_have():
    found = [ratio.value for ratio in compiled_tables.ratios(COSTS, "gpu")]
    assert found == [2.0, 0.5]
    assert [r.value for r in compiled_tables.ratios(COSTS, "gpu", "haiku")] == [1.5]
    assert [r.value for r in compiled_tables.ratios(COSTS, "tpu")] == [0.8]


def test_the_summary_has_a_mean_and_the_least_for_each_mode():
    first, _, *rows = cells(compiled_tables.summary(COSTS, NAMES))
    assert first[1:] == ["H100: mean", "H100: least", "TPU v5e: mean", "TPU v5e: least"]
    assert rows == [
        [EVALUATION, "1.00", "0.50", "-", "-"],
        [BLOCK, "-", "-", "0.80", "0.80"],
    ]


def test_a_library_without_a_layer_has_a_dash():
    libraries = ["normjax", "flax.linen", "haiku"]
    _, _, *rows = cells(compiled_tables.values_table(COSTS, "gpu", libraries))
    assert rows[0] == ["layer_norm a", "float32", EVALUATION, "2.00", "4.00", "3.00", "2.00"]
    assert rows[1] == ["layer_norm b", "float32", EVALUATION, "4.00", "2.00", "-", "0.50"]
    assert rows[2] == ["layer_norm a", "float32", TRAINING, "9.00", "-", "-", "-"]
    assert rows[3] == [rows[3][0], "", EVALUATION, "1", "1.00", "1.50", ""]


def test_the_report_has_all_costs():
    text = "\n".join(compiled_tables.report(COSTS, NAMES, ["normjax", "flax.linen"]))
    assert f"jax {jax.__version__}" in text
    line = "| layer_norm a | float32 | training step | normjax | 9.00 | 2 | 0.50 | 0 |"
    assert f"{line} all-gather x1, x2 |" in text
    assert text.count("| none |") == len(COSTS) - 1


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    compiled_picture.draw(COSTS, NAMES, tmp_path / "compiled.png")
    assert (tmp_path / "compiled.png").stat().st_size > 10_000


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("library", compiled.LIBRARIES)
def test_compiled_programs_run(library):
    """Compiled for the CPUs of this test, since any device may be the target."""
    adapter = {"haiku": "haiku", "equinox": "equinox"}.get(library, "jax")
    pytest.importorskip(adapter, reason=f"{library} is not installed")
    devices = jax.devices()[: described.DEVICES]
    evaluation, training = (
        compiled.cost(compiled.Case(TINY, "float32", mode), library, "gpu", devices)
        for mode in (EVALUATION, TRAINING)
    )
    assert not evaluation.collectives
    assert dict(training.collectives)["all-reduce"] >= 2
    # The least reads and writes.
    assert evaluation.value >= 2
    assert training.value >= 5
    program = compiled.layer_program(TINY, "float32", TRAINING, library)
    x, dy = (
        jnp.asarray(np.random.default_rng(7).normal(size=s.shape), s.dtype) for s in program.batched
    )
    y, _, (_, dx) = jax.jit(program.function)(program.whole, (x, dy))
    # The gradient of a norm is orthogonal to its output and to constants.
    features = 1 if library == "equinox" else 3
    axes = tuple(axis for axis in range(4) if axis != features)
    np.testing.assert_allclose(jnp.sum(dx, axes), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.mean(y, axes), 0, atol=1e-5)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("row", compiled.BLOCKS, ids=lambda row: row.name)
def test_blocks_have_the_same_parameters_with_the_norms_of_both_libraries(row):
    programs = [compiled.block_program(row, library) for library in compiled.LINEN]
    shapes = [jax.tree.map(lambda leaf: leaf.shape, program.whole) for program in programs]
    assert shapes[0] == shapes[1]
    results = [jax.eval_shape(p.function, p.whole, p.batched) for p in programs]
    ((loss, updates), (grads, dx)), _ = results
    assert (loss.shape, dx.shape) == ((), row.shape)
    assert jax.tree.structure(grads) == jax.tree.structure(programs[0].whole[0])
    assert jax.tree.structure(updates) == jax.tree.structure(programs[0].whole[1])


def test_blocks_need_linen_modules():
    with pytest.raises(compiled.Missing, match=r"flax\.linen"):
        compiled.block_program(compiled.BLOCKS[0], "haiku")


def test_sharding_the_batch_adds_collectives():
    def total(whole, batched):
        return jnp.sum(batched) * whole

    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    found = [
        hlo.parse(described.compile_for(jax.devices()[:n], total, scalar, shape).as_text())
        for n in (1, 4)
    ]
    assert [len(program.collectives()) for program in found] == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "layernorm"], "no row matches; there are\n  batch_norm ResNet-50"),
        (["--platform", "cpu"], "no such platform: cpu; there are gpu, tpu"),
        (["--peers", "torch"], "no such peers: torch; there are normjax, flax.linen"),
    ],
)
def test_an_unknown_option_is_an_error_that_lists_the_known_ones(options, words, capsys):
    with pytest.raises(SystemExit):
        compiled.main(options)
    assert words in capsys.readouterr().err


def test_a_choice_of_rows_and_libraries():
    options = ["--platform", "tpu", "--only", "rms_norm", "--peers", "flax.linen"]
    args = compiled.arguments(options)
    assert args.peers == ["normjax", "flax.linen"]
    assert [(case.dtype, case.mode) for case in args.cases] == [
        (dtype, mode) for dtype in ("float32", "bfloat16") for mode in (EVALUATION, TRAINING)
    ]
