"""The report names each injected fault; a healthy model has a clean report."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax.linen
from normjax import surgery
from tests.models import NORMS, ResNet, images

pytestmark = pytest.mark.usefixtures("lenient")

MODEL = ResNet()
BATCHES = [images(seed=s, n=32) for s in range(100, 104)]


def call(variables, batch, *, train, mutable=False):
    return MODEL.apply(variables, batch, train, mutable=mutable)


@pytest.fixture(scope="module")
def healthy():
    """Variables of a network trained to classify images by the mean of their first channel."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return train()


def train():
    variables = MODEL.init(jax.random.key(0), images()[:1], False)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 60))

    @jax.jit
    def step(variables, state, x):
        def loss(params):
            logits, updates = MODEL.apply(
                {**variables, "params": params}, x, True, mutable=["batch_stats"]
            )
            labels = jnp.asarray(x[..., 0].mean((1, 2)) > 0.5, int)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
        change, state = optimizer.update(gradient, state)
        return {"params": optax.apply_updates(variables["params"], change), **updates}, state

    state = optimizer.init(variables["params"])
    for seed in range(60):
        variables, state = step(variables, state, images(seed=seed, n=32))
    return variables


@pytest.fixture(scope="module")
def report(healthy):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return surgery.diagnose(call, healthy, BATCHES)


def kinds(report, path=None):
    return {f.kind for f in report.findings if path in (None, f.path)}


def edited(variables, path, collection="batch_stats", **changes):
    """New variables with functions applied to some leaves of one layer."""

    def change(names, leaf):
        *layer, name = (key.key for key in names)
        if layer == [collection, *path.split("/")] and name in changes:
            return changes[name](leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(change, variables)


def test_diagnose_guarantee_healthy_is_clean(report):
    assert report.healthy, str(report)
    assert {norm.path for norm in report.norms} == NORMS
    assert report.batches == 4
    assert 0 < report.outputs_apart < 0.3
    assert "healthy, from 4 batches" in str(report)
    report.raise_if_serious()


def test_the_numbers_equal_those_of_float64(healthy, report):
    """The first layer's input is a convolution of the images, in NumPy."""
    kernel = np.asarray(healthy["params"]["stem"]["kernel"], np.float64)
    x = np.concatenate([np.asarray(b, np.float64) for b in BATCHES])
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(padded[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    norm = next(norm for norm in report.norms if norm.path == "stem_bn")
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    np.testing.assert_allclose(norm.actual_mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm.actual_var, var, rtol=1e-5)
    stats = healthy["batch_stats"]["stem_bn"]
    spread = np.asarray(stats["var"], np.float64) + 1e-5
    m, v = mean - np.asarray(stats["mean"]), var + 1e-5
    np.testing.assert_allclose(norm.shift, np.abs(m) / np.sqrt(spread), rtol=1e-3, atol=1e-5)
    kl = 0.5 * (v / spread + m**2 / spread - 1 - np.log(v / spread))
    np.testing.assert_allclose(norm.divergence, kl, rtol=1e-3, atol=1e-5)
    # The difference between both modes on the images.
    differences = []
    for batch in np.split(y, 4):
        trained = (batch - batch.mean((0, 1, 2))) / np.sqrt(batch.var((0, 1, 2)) + 1e-5)
        served = (batch - np.asarray(stats["mean"])) / np.sqrt(spread)
        differences.append(np.mean((trained - served) ** 2))
    np.testing.assert_allclose(norm.modes_apart, np.sqrt(np.mean(differences)), rtol=1e-2)


def test_diagnose_guarantee_every_failure_has_a_name(healthy):
    """One injected fault at a time."""
    last = "block_1/last"
    faults = {
        "stale": edited(healthy, last, mean=lambda m: m + 3, var=lambda v: v / 4),
        "never updated": surgery.reset(healthy, at=last),
        "not finite": edited(healthy, last, mean=lambda m: m.at[1].set(jnp.nan)),
        "dead channels": edited(healthy, last, "params", scale=lambda s: s.at[2].set(0.0)),
        "exploding": edited(healthy, last, "params", bias=lambda b: b.at[2].set(1e3)),
    }
    for kind, variables in faults.items():
        got = surgery.diagnose(call, variables, BATCHES, at=last)
        assert kinds(got) == {kind}, str(got)
        assert kind.lower() in str(got).lower()
        if kind == "dead channels":
            got.raise_if_serious()
        else:
            with pytest.raises(surgery.SeriousFindingError, match=f"{last}: "):
                got.raise_if_serious()


def test_another_domain_is_stale_until_recompute(healthy):
    other = [3 - 2 * batch for batch in BATCHES]
    before = surgery.diagnose(call, healthy, other)
    assert "stale" in kinds(before, "stem_bn")
    assert before.outputs_apart > 0.3
    after = surgery.diagnose(call, surgery.recompute(call, healthy, other), other)
    assert "stale" not in kinds(after)


class Net(nn.Module):
    """One layer before one norm."""

    layer: nn.Module
    norm: nn.Module

    @nn.compact
    def __call__(self, x, train):
        return self.norm(self.layer(x), use_running_average=not train)


def single(norm, batches, layer=None, scale_input=1.0, recomputed=True):
    """The report of one layer whose running statistics are recomputed on the batches."""
    model = Net(layer or nn.Dropout(0.0, deterministic=True), norm)
    variables = model.init(jax.random.key(0), batches[0], False)

    def run(variables, batch, *, train, mutable=False):
        return model.apply(variables, batch * scale_input, train, mutable=mutable)

    if recomputed:
        variables = surgery.recompute(run, variables, batches)
    return surgery.diagnose(run, variables, batches)


def test_variance_at_the_epsilon_floor():
    got = single(nn.BatchNorm(), BATCHES, scale_input=jnp.array([1.0, 1e-3]))
    assert kinds(got) == {"epsilon floor"}
    assert "1 of 2 channels (1)" in str(got)
    assert not kinds(
        single(nn.BatchNorm(epsilon=1e-9), BATCHES, scale_input=jnp.array([1.0, 1e-3]))
    )


def test_a_constant_input_is_a_dead_channel():
    got = single(nn.BatchNorm(), BATCHES, scale_input=jnp.array([1.0, 0.0]))
    assert kinds(got) == {"dead channels"}
    assert "1 have a constant input, 0 a scale of 0" in str(got)


@pytest.mark.parametrize("kind", [nn.BatchNorm, normjax.linen.BatchNorm])
def test_few_samples_counts_independent_samples(kind, rng):
    independent = [jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32) for _ in range(8)]
    assert not kinds(single(kind(), independent))
    # All positions of an image are equal: an image counts as one sample.
    constant = [jnp.broadcast_to(batch[:, :1, :1], batch.shape) for batch in independent]
    got = single(kind(), constant)
    assert kinds(got) == {"few samples"}
    assert got.norms[0].samples == 4
    assert "4 times as many devices" in str(got)
    assert "group norm" in str(got)
    rows = [batch[:, 0, 0] for batch in independent]
    assert single(kind(), rows).norms[0].samples == 4
    assert not kinds(single(kind(), [jnp.concatenate(rows)]))


def test_synchronized_devices_count_the_samples_of_all(rng):
    x = jnp.asarray(rng.normal(size=(32, 3)), jnp.float32)
    layer = nn.BatchNorm(axis_name="batch")
    variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), x)

    def run(variables, batch, *, train, mutable=False):
        local = partial(layer.apply, use_running_average=not train, mutable=mutable)
        apply = jax.vmap(local, (None, 0), (0, None) if mutable else 0, axis_name="batch")
        return apply(variables, batch.reshape(4, 8, 3))

    got = surgery.diagnose(run, surgery.recompute(run, variables, [x]), [x])
    assert got.norms[0].samples == 32
    assert got.healthy, str(got)


def test_modes_apart_where_batches_differ(rng):
    sorted_by_class = [jnp.asarray(rng.normal(5 * k, 1, (64, 3)), jnp.float32) for k in range(4)]
    got = single(nn.BatchNorm(), sorted_by_class)
    assert kinds(got) == {"modes apart"}
    assert got.norms[0].modes_apart > 1


@pytest.mark.parametrize(
    "layer", [nn.Conv(3, (3, 3)), nn.Dense(3), nn.ConvTranspose(3, (2, 2))], ids=["c", "d", "t"]
)
def test_a_redundant_bias_before_a_norm(layer):
    got = single(nn.BatchNorm(), BATCHES, layer=layer)
    assert kinds(got) == {"redundant bias"}
    assert "'layer' has a bias" in str(got)
    got = single(nn.BatchNorm(), BATCHES, layer=layer.clone(use_bias=False))
    assert got.healthy, str(got)


def test_statistics_that_differ_between_devices(healthy):
    """Stacked arrays, as pmap returns them, and arrays whose sharding is replicated."""
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), healthy)
    got = surgery.diagnose(call, stack, BATCHES)
    assert got.healthy, str(got)
    changed = edited(stack, "stem_bn", mean=lambda m: m.at[3].add(0.01))
    got = surgery.diagnose(call, changed, BATCHES)
    assert kinds(got) == {"devices differ"}
    assert [finding.path for finding in got.findings] == ["stem_bn"]

    mesh = Mesh(jax.devices()[:4], "d")
    mean = healthy["batch_stats"]["stem_bn"]["mean"]
    pieces = [jax.device_put(mean + 0.01 * (i == 2), d) for i, d in enumerate(mesh.devices.flat)]
    faulty = jax.make_array_from_single_device_arrays(mean.shape, NamedSharding(mesh, P()), pieces)
    replicated = jax.device_put(healthy, NamedSharding(mesh, P()))
    assert surgery.diagnose(call, replicated, BATCHES, at="stem_bn").healthy
    got = surgery.diagnose(call, edited(replicated, "stem_bn", mean=lambda _: faulty), BATCHES)
    assert "devices differ" in kinds(got, "stem_bn")


def test_diagnose_guarantee_pure(healthy):
    before = jax.tree.map(np.array, healthy)
    surgery.diagnose(call, healthy, iter(BATCHES), limit=1)
    jax.tree.map(np.testing.assert_array_equal, healthy, before)


def test_frozen_layers_have_no_row_in_the_report(healthy):
    frozen = surgery.freeze(MODEL.apply, at="block_*")

    def run(variables, batch, *, train, mutable=False):
        return frozen(variables, batch, train, mutable=mutable)

    got = surgery.diagnose(run, healthy, BATCHES, limit=1)
    assert [norm.path for norm in got.norms] == ["stem_bn"]


def test_diagnose_edge_model_compared_on_odd_outputs(healthy):
    def run(variables, batch, *, train, mutable=False):
        out = MODEL.apply(variables, batch, train, mutable=mutable)
        return out if mutable else (out, out)

    assert surgery.diagnose(run, healthy, BATCHES[:1]).outputs_apart is None


def test_error_messages(healthy):
    cases = [
        (ValueError, "diagnose: the batches are empty", (call, healthy, [])),
        (ValueError, "the batches are empty", (call, healthy, iter([]))),
        (TypeError, "batches is int", (call, healthy, 3)),
        (ValueError, "no statistics of a batch norm", (call, {"params": {}}, BATCHES)),
        (ValueError, "not finite", (call, healthy, [BATCHES[0] * jnp.nan])),
        (
            ValueError,
            "batch 1 .* has the shapes",
            (call, healthy, [BATCHES[0], BATCHES[0][..., :1]]),
        ),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            surgery.diagnose(*arguments)
    with pytest.raises(ValueError, match="matches no batch norm"):
        surgery.diagnose(call, healthy, BATCHES, at="nowhere")


def test_the_plot(report, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    figure = report.plot()
    left, _, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [n.path for n in report.norms]
    bars = right.patches[: len(report.norms)]
    assert [bar.get_width() for bar in bars] == [n.samples for n in report.norms]
    figure.savefig(tmp_path / "report.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot()


def test_colors_show_the_findings_of_their_panel(healthy):
    """A layer with stale statistics has vermilion dots, and a blue bar of samples."""
    matplotlib = pytest.importorskip("matplotlib")
    stale = edited(healthy, "stem_bn", mean=lambda m: m + 3)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        report = surgery.diagnose(call, stale, BATCHES, progress=False)
    left, _, right = report.plot().axes
    blue, vermilion = (matplotlib.colors.to_rgb(c) for c in ("#0072B2", "#D55E00"))
    for row, norm in enumerate(report.norms):
        expected = vermilion if "stale" in kinds(report, norm.path) else blue
        assert tuple(left.collections[row].get_facecolor()[0][:3]) == expected
        assert right.patches[row].get_facecolor()[:3] == blue
    assert "stale" in kinds(report, "stem_bn")


def test_a_remedy_is_shown_once(healthy):
    new = surgery.diagnose(call, surgery.reset(healthy), BATCHES)
    serious = [finding for finding in new.findings if finding.kind == "never updated"]
    assert len(serious) == len(new.norms) > 1
    for text in (str(new), new._repr_html_()):
        assert text.count("Train and keep the statistics") == 1
        assert all(finding.path in text for finding in serious)


def test_a_notebook_shows_the_table(report):
    html = report._repr_html_()
    assert html.count("<tr>") == 1 + len(report.norms)
    assert html.count("<li>") == len(report.findings)
    assert all(norm.path in html for norm in report.norms)
