"""The counts of benchmarks/second_pass.py match compiled programs."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normjax.linen
from normjax._core import algorithms
from normjax._core.lowering import VARIABLE

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from benchmarks import second_pass


class Net(nn.Module):
    """Three layers, with channels that become 0."""

    norm: object

    @nn.compact
    def __call__(self, x, alive):
        for features in (4, 6, 4):
            x = nn.relu(nn.Conv(features, (3, 3))(x)) * alive[:features]
            x = self.norm(x)
        return nn.Dense(3)(x.mean((1, 2)))


def run(norm, steps, shift):
    """A run with momentum 0.5, whose inputs move by `shift` in every fifth step."""
    model = Net(norm)

    def loss(params, stats, x, alive):
        variables = {"params": params, "batch_stats": stats}
        y, updates = model.apply(variables, x, alive, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y)), updates.get("batch_stats", {})

    def batches(steps):
        rng = np.random.default_rng(0)
        for i in range(steps):
            alive = (np.arange(6) % 3 > 0) | (i < 6)
            x = rng.normal(shift * (i // 5), 1, (8, 16, 16, 2))
            yield x.astype(np.float32), alive.astype(np.float32)

    variables = jax.jit(model.init)(jax.random.key(0), *next(batches(1)))
    start = variables["params"], variables.get("batch_stats", {})
    return second_pass.Run("", 0.5, steps, loss, optax.sgd(1e-2), start, batches)


def batch(x):
    return normjax.linen.BatchNorm(momentum=0.5)(x, train=True)


def group(x):
    return normjax.linen.GroupNorm(num_groups=None, group_size=2)(x)


def instance(x):
    return normjax.linen.InstanceNorm()(x)


def combed(x):
    """In one of three layers, all sampled entries are far from the others."""
    rows, columns = (jnp.arange(n) for n in x.shape[1:3])
    hit = (rows % 4 == 2)[:, None, None] & (columns % 2 == 1)[:, None]
    return normjax.linen.InstanceNorm()(x + 30.0 * hit if x.shape[-1] == 6 else x)


@pytest.fixture
def branches(monkeypatch):
    """A function that records the decisions of a form in a list."""

    def watch(form):
        found = []
        decide = algorithms.around_pivot_is_exact

        def noted(*args):
            exact = decide(*args)
            jax.debug.callback(lambda exact: found.append(bool(exact)), exact)
            return exact

        monkeypatch.setenv(VARIABLE, form)
        monkeypatch.setattr(algorithms, "around_pivot_is_exact", noted)
        jax.clear_caches()
        return found

    yield watch
    jax.clear_caches()


@pytest.mark.parametrize(
    ("form", "norm", "shift", "mixed"),
    [
        ("tpu", batch, 2.0, True),
        ("gpu", batch, 2.0, True),
        ("gpu", instance, 0.0, False),
        ("gpu", combed, 0.0, True),
        ("tpu", group, 3.0, True),
    ],
)
def test_counts_match_the_compiled_program(branches, lenient, form, norm, shift, mixed):
    found, steps, layers = branches(form), 20, 3
    trained = run(norm, steps, shift)._replace(platform=form)
    # The decisions during init.
    jax.effects_barrier()
    found.clear()
    _, seen = trained.train()
    jax.effects_barrier()
    assert len(found) == steps * layers
    taken = np.stack([guard.excess for guard in seen.values()]) > second_pass.LIMIT
    assert taken.sum() == found.count(False)
    assert bool(0 < taken.sum() < taken.size) is mixed


def test_one_conditional_per_layer(lenient):
    given = run(batch, 1, 0.0)
    assert [given.conditionals(form) for form in ("cpu", "gpu", "tpu")] == [0, 3, 3]
    given = run(instance, 1, 0.0)
    assert [given.conditionals(form) for form in ("cpu", "gpu", "tpu")] == [0, 3, 0]
    given = run(group, 1, 0.0)
    assert [given.conditionals(form) for form in ("cpu", "gpu", "tpu")] == [0, 3, 3]


def test_the_table(lenient):
    guards = {
        name: second_pass.Guard(
            np.array([9.0] * early + [1.0] * (100 - early) + [5.0] * late + [0.0] * (50 - late)),
            *(np.full(150, value) for value in (3, 0.5, 0.1, 2)),
        )
        for name, early, late in (("a_0", 10, 0), ("a_1", 0, 5))
    }
    row = second_pass.found(second_pass.Run("", 0.5, 150, None, None, (), None), guards)
    assert (row.first, row.then, row.worst, row.worst_share) == (0.05, 0.05, "a 1", 0.1)
    assert row.largest == 9
    assert row.cause == "2 features, 0.5 off at a deviation of 0.1"
    lines = list(second_pass.table([row]))
    assert lines[2].startswith("|  | 0.5 | 2 | 150 | 5.00 | 5.00 | 9 | a 1 | 10.00 | 2 features")
    assert {len(line.split("|")) for line in lines} == {12}


@pytest.mark.parametrize("name", second_pass.RUNS)
def test_every_run_can_be_created(lenient, name):
    """The loss is a scalar, and all layers are found."""
    layers = {"digits": 6, "deep": 20, "finetune": 6, "unet": 10}
    first = next(second_pass.RUNS[name](0.01))
    (batch,) = first.batches(1)
    watched = partial(second_pass.watched, first.loss, first.platform)
    (value, _), seen = jax.eval_shape(watched, *first.start, *batch)
    assert value.shape == ()
    assert len(seen) == layers[name]
