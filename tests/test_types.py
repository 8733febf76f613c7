"""Type checks: README passes mypy --strict, results have the types of inputs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROMISED = '''
from typing import Any, assert_type

import normjax.nnx
from flax import nnx
from normjax import surgery


def call(variables: Any, batch: jax.Array, *, train: bool, mutable: Any = False) -> Any:
    return model.apply(variables, batch, train=train, mutable=mutable)


batches = [x, x[:7]]
rngs = nnx.Rngs(0)
running = normjax.BatchStats.make(3)
assert_type(normjax.batch_norm(x, running, train=True), tuple[jax.Array, normjax.BatchStats])
assert_type(normjax.batch_norm(x, None, train=True), tuple[jax.Array, None])
assert_type(normjax.batch_norm_act(x, running, train=False), tuple[jax.Array, normjax.BatchStats])
assert_type(normjax.batch_norm_act(x, None, train=True), tuple[jax.Array, None])
assert_type(normjax.batch_renorm(x, running, train=True), tuple[jax.Array, normjax.BatchStats])


def either(given: normjax.BatchStats | None) -> None:
    """The result is optional if the argument is."""
    _, kept = normjax.batch_norm(x, given, train=True)
    assert_type(kept, normjax.BatchStats | None)


normjax.add_layer_norm(x, x, axis=-1, epsilon=1e-5, mask=None)
normjax.add_layer_norm(x, x, eps=1e-5)  # type: ignore[call-arg]
normjax.add_rms_norm(x, x, eps=1e-5)  # type: ignore[call-arg]

tree: dict[str, dict[str, jax.Array]] = {}
assert_type(surgery.reset(tree), dict[str, dict[str, jax.Array]])
assert_type(surgery.convert(tree), dict[str, dict[str, jax.Array]])
assert_type(surgery.recompute(call, tree, batches), dict[str, dict[str, jax.Array]])
assert_type(surgery.recompute(net, batches), Net)
assert_type(surgery.freeze(net), Net)
assert_type(surgery.convert(net), Net)
assert_type(surgery.import_torch(tree, {}, []), dict[str, dict[str, jax.Array]])
model.apply(surgery.recompute(call, variables, batches), x, train=False)

layer = normjax.nnx.BatchNorm(3, rngs=rngs)
assert_type(layer, normjax.nnx.BatchNorm)
assert_type(layer(x, train=True), jax.Array)
assert_type(normjax.nnx.GroupNorm(6, num_groups=3, rngs=rngs)(x, mask=None), jax.Array)
assert_type(normjax.nnx.AddLayerNorm(3, rngs=rngs)(x, x), tuple[jax.Array, jax.Array])
assert_type(normjax.nnx.move_batch_stats(layer), None)
normjax.nnx.BatchNorm(3, eps=1e-5, rngs=rngs)  # type: ignore[call-arg]
normjax.nnx.LayerNorm(3)  # type: ignore[call-arg]
layer(x, False, True)  # type: ignore[call-arg]


def double(x: float) -> float:
    return 2 * x


assert_type(surgery.guard(double)(1.0), float)
assert_type(surgery.synchronize(double, "batch")(1.0), float)
'''


# train() and eval() of flax.nnx are untyped, scikit-learn and optax are partly typed.
MYPY = (
    "mypy",
    "--strict",
    "--allow-untyped-calls",
    "--ignore-missing-imports",
    "--config-file=",
)


def run_checker(*command, cwd=ROOT):
    pytest.importorskip(command[0])
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("checker", [MYPY, ("pyright", "--pythonpath", sys.executable)])
def test_type_checkers_accept_readme_evidence_and_the_promised_types(tmp_path, checker):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    page = tmp_path / "page.py"
    # The ignored errors have the codes of mypy.
    page.write_text("\n".join([*blocks, PROMISED if checker is MYPY else ""]))
    # In one run, since reading the types of JAX takes most of the time.
    folder = ROOT / "examples" / "evidence"
    files = sorted(path.name for path in folder.glob("*.py"))
    run_checker(*checker, str(page), *files, cwd=folder)
