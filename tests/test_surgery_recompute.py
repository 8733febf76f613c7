"""Population statistics against float64, and against PyTorch's update_bn, which is inaccurate."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax.linen
from normjax import surgery
from tests.models import NORMS, ResNet, images, trained

pytestmark = pytest.mark.usefixtures("lenient")

SIZES = (2, 2, 4, 8, 16, 32, 64)
BOTH = pytest.mark.parametrize("kind", [nn.BatchNorm, normjax.linen.BatchNorm])


def drifting(offset=0.0, shape=(128, 3, 3, 5), seed=3):
    """Examples whose mean and spread change from the first to the last."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, shape[0])[:, None, None, None]
    channel = np.arange(1, shape[-1] + 1)
    x = rng.normal(0, 1, shape) * (1 + 2 * time) + 8 * time * channel + offset * channel
    return x.astype(np.float32)


def cut(x, sizes=SIZES):
    return np.split(x, np.cumsum(sizes)[:-1])


def population(x, ddof=0):
    x = x.astype(np.float64).reshape(-1, x.shape[-1])
    return {"mean": x.mean(0), "var": x.var(0, ddof=ddof)}


def call_of(layer, apply=None):
    apply = apply or layer.apply

    def call(variables, batch, *, train, mutable=False):
        return apply(variables, batch, use_running_average=not train, mutable=mutable)

    return call


def start(layer, x):
    return layer.init(jax.random.key(0), x[:2], use_running_average=True)


def near(stats, expected, rtol=1e-6):
    for name in ("mean", "var"):
        np.testing.assert_allclose(np.asarray(stats[name], np.float64), expected[name], rtol=rtol)


@BOTH
@pytest.mark.parametrize("offset", [0.0, -1e5])
def test_recompute_guarantee_exact(kind, offset):
    layer, x = kind(), drifting(offset)
    new = surgery.recompute(call_of(layer), start(layer, x), cut(x))
    near(new["batch_stats"], population(x))


@BOTH
def test_recompute_guarantee_cut_as_you_like(kind):
    layer, x = kind(), drifting(1e3)
    for sizes in ((128,), (64, 64), (2,) * 64):
        new = surgery.recompute(call_of(layer), start(layer, x), cut(x, sizes))
        near(new["batch_stats"], population(x))


def test_update_bn_of_pytorch_is_off_by_factors():
    torch = pytest.importorskip("torch")
    x = drifting()
    layer = torch.nn.BatchNorm2d(5)
    torch.optim.swa_utils.update_bn([torch.tensor(np.moveaxis(b, -1, 1)) for b in cut(x)], layer)
    expected = population(x, ddof=1)
    assert (expected["var"] / layer.running_var.numpy()).min() > 2.5
    assert (expected["mean"] / layer.running_mean.numpy()).min() > 2


def test_recompute_of_many_batches_is_accurate():
    layer, x = nn.BatchNorm(), drifting(1e2, shape=(6000, 1, 1, 2))
    new = surgery.recompute(call_of(layer), start(layer, x), cut(x, (4,) * 1500))
    near(new["batch_stats"], population(x), rtol=5e-7)


def test_recompute_respects_ddof_and_half_precision():
    layer, x = normjax.linen.BatchNorm(ddof=1), drifting().astype(jnp.bfloat16)
    new = surgery.recompute(call_of(layer), start(layer, x), np.split(x, 4))
    near(new["batch_stats"], population(x.astype(np.float32), ddof=1))


def test_recompute_replaces_statistics_that_are_not_finite():
    layer, x = nn.BatchNorm(), drifting()
    variables = start(layer, x)
    broken = {
        **variables,
        "batch_stats": jax.tree.map(lambda v: v * jnp.nan, variables["batch_stats"]),
    }
    near(surgery.recompute(call_of(layer), broken, [x])["batch_stats"], population(x))


class Masked(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, mask, train):
        return self.norm(use_running_average=not train, name="bn")(x, mask=mask)


@BOTH
def test_recompute_with_masks(kind):
    x = drifting(50.0)
    counts = np.random.default_rng(0).random((128, 3, 3, 1)) < 0.4
    counts[:4] = False
    sizes = (4, 62, 62)  # The first batch is masked.
    model = Masked(kind)
    variables = model.init(jax.random.key(0), x[:2], None, False)

    def call(variables, batch, *, train, mutable=False):
        return model.apply(variables, *batch, train, mutable=mutable)

    kept = np.where(counts, x, np.nan) if kind is normjax.linen.BatchNorm else x
    new = surgery.recompute(
        call, variables, list(zip(cut(kept, sizes), cut(counts, sizes), strict=True))
    )
    valid = np.broadcast_to(counts, x.shape)[..., 0]
    near(new["batch_stats"]["bn"], population(x[valid]))


def test_recompute_edge_feature_with_every_entry_masked():
    model, x = Masked(), drifting()
    variables = model.init(jax.random.key(0), x[:2], None, False)
    mask = np.ones(x.shape, bool)
    mask[..., 2] = False

    def call(variables, batch, *, train, mutable=False):
        return model.apply(variables, *batch, train, mutable=mutable)

    new = surgery.recompute(call, variables, [(x, mask)])["batch_stats"]["bn"]
    assert (new["mean"][2], new["var"][2]) == (0, 1)
    keep = np.array([0, 1, 3, 4])
    near(jax.tree.map(lambda leaf: leaf[keep], new), population(x[..., keep]))


def on_devices(layer, transformation):
    """A call that spreads the batch over four devices."""
    mesh = Mesh(jax.devices()[:4], "batch")
    if transformation == "sharded jit":
        return call_of(layer), lambda batch: jax.device_put(batch, NamedSharding(mesh, P("batch")))
    apply = layer.apply if layer.axis_name else surgery.synchronize(layer.apply, "batch")

    def call(variables, batch, *, train, mutable=False):
        local = partial(apply, use_running_average=not train, mutable=mutable)
        if transformation == "vmap":
            batch = batch.reshape(4, -1, *batch.shape[1:])
            return jax.vmap(local, (None, 0), (0, None), axis_name="batch")(variables, batch)
        specs = dict(in_specs=(P(), P("batch")), out_specs=(P("batch"), P()))
        return jax.shard_map(local, mesh=mesh, **specs)(variables, batch)

    return call, lambda batch: batch


@BOTH
@pytest.mark.parametrize(
    "transformation", ["shard_map", "vmap", "sharded jit", "written without axis_name"]
)
def test_recompute_guarantee_any_devices(kind, transformation):
    named = transformation in ("shard_map", "vmap")
    layer, x = kind(axis_name="batch" if named else None), drifting(1e4)
    call, place = on_devices(layer, transformation)
    batches = [place(batch) for batch in cut(x, (4, 4, 60, 60))]
    new = surgery.recompute(call, start(kind(), x), batches)
    near(new["batch_stats"], population(x))


def in_model(model):
    def call(variables, batch, *, train, mutable=False):
        return model.apply(variables, batch, train, mutable=mutable)

    return call


def by_path(stats, prefix=""):
    if "mean" in stats:
        return {prefix[:-1]: stats}
    return {k: v for n, s in stats.items() for k, v in by_path(s, f"{prefix}{n}/").items()}


@pytest.mark.parametrize("kind", [nn.BatchNorm, normjax.linen.BatchNorm])
@pytest.mark.parametrize("wrapped", [lambda block: block, nn.remat, nn.jit])
def test_recompute_guarantee_any_model(kind, wrapped):
    """With one batch, the result equals an update with momentum 0."""
    model = ResNet(batch_norm=kind, wrap=wrapped)
    variables = trained(model)
    without_momentum = model.clone(momentum=0.0)
    _, expected = without_momentum.apply(variables, images(seed=4), True, mutable=["batch_stats"])
    new = surgery.recompute(in_model(model), variables, [images(seed=4)])
    got, expected = by_path(new["batch_stats"]), by_path(expected["batch_stats"])
    assert set(got) == NORMS
    for path in NORMS:
        # Flax computes E[x^2] - E[x]^2 in float32.
        near(got[path], expected[path], rtol=1e-4)


def test_recompute_inside_scan_with_a_shared_layer():
    """A recurrent cell; the statistics of its batch norm are the carry of a scan."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            y = nn.BatchNorm(use_running_average=False, name="bn")(x)
            return carry, y

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = dict(variable_carry="batch_stats", variable_broadcast="params", in_axes=1)
            return nn.scan(Cell, split_rngs={"params": False}, **options)(name="cells")(0.0, x)[1]

    x = drifting(30.0)[:, :, 0]
    # Flax's scan cannot create carried variables in init.
    layer = start(nn.BatchNorm(), x)
    variables = {name: {"cells": {"bn": node}} for name, node in layer.items()}
    new = surgery.recompute(
        lambda v, batch, *, train, mutable: Model().apply(v, batch, mutable=mutable),
        variables,
        np.split(x, 4),
    )
    near(new["batch_stats"]["cells"]["bn"], population(x))


def test_recompute_edge_layer_that_runs_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            layer = nn.BatchNorm(use_running_average=not train, name="bn")
            return layer(x) + layer(3 * x)

    x = drifting()
    variables = Twice().init(jax.random.key(0), x[:2], False)
    new = surgery.recompute(in_model(Twice()), variables, np.split(x, 4))
    near(new["batch_stats"]["bn"], population(np.concatenate([x, 3 * x])))


def test_recompute_edge_layer_that_is_frozen_inside_call():
    model = ResNet()
    variables = trained(model)
    frozen = surgery.freeze(model.apply, at="block_0/*")

    def call(variables, batch, *, train, mutable=False):
        return frozen(variables, batch, train, mutable=mutable)

    new = by_path(surgery.recompute(call, variables, [images(seed=4)])["batch_stats"])
    for path, node in by_path(variables["batch_stats"]).items():
        assert np.array_equal(new[path]["mean"], node["mean"]) == path.startswith("block_0/")


def test_recompute_edge_count_beside_mean_and_var():
    layer, x = normjax.linen.BatchNorm(debias=True), drifting()
    new = surgery.recompute(call_of(layer), start(layer, x), np.split(x, 4))["batch_stats"]
    np.testing.assert_array_equal(new["count"], np.full(5, 4))


def test_recompute_by_path_and_limit():
    model = ResNet()
    variables = trained(model)
    old = by_path(variables["batch_stats"])
    taken = []

    def batches():
        for seed in range(5):
            taken.append(seed)
            yield images(seed=seed)

    new = surgery.recompute(in_model(model), variables, batches(), at="*/last", limit=2)
    assert taken == [0, 1]
    for path, node in by_path(new["batch_stats"]).items():
        assert np.array_equal(node["mean"], old[path]["mean"]) != path.endswith("/last")
    same = surgery.recompute(in_model(model), variables, [images(0), images(1)], at="*/last")
    jax.tree.map(np.testing.assert_array_equal, new, same)


def test_recompute_guarantee_pure():
    layer, x = nn.BatchNorm(), drifting()
    variables = freeze(start(layer, x))
    before = jax.tree.map(np.array, variables)
    new = surgery.recompute(call_of(layer), variables, [x])
    assert isinstance(new, type(variables))
    assert new["params"]["scale"] is variables["params"]["scale"]
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    with pytest.raises(ValueError, match="not finite"):
        surgery.recompute(call_of(layer), variables, [x[:2] * np.nan])
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_recompute_error_messages():
    layer, x = nn.BatchNorm(), drifting()
    variables, call = start(layer, x), call_of(layer)
    spent = iter(cut(x))
    list(spent)
    bad = x.copy()
    bad[20, 0, 0, 0] = np.nan
    cases = [
        (ValueError, "the batches are empty", (call, variables, spent), {}),
        (ValueError, "limit=0, expected", (call, variables, cut(x)), {"limit": 0}),
        (TypeError, "batches is int", (call, variables, 3), {}),
        (ValueError, r"no statistics of a batch norm", (call, {"params": {}}, cut(x)), {}),
        (ValueError, r"at='bn' matches no batch norm", (call, variables, cut(x)), {"at": "bn"}),
        (
            ValueError,
            r"\[''\] are not finite.*first in batch 1",
            (call, variables, np.split(bad, 8)),
            {},
        ),
        (
            ValueError,
            r"batch 1 .* has the shapes \(2, 3, 3, 4\), the first one had \(2, 3, 3, 5\).*'' is "
            r"given features of shape \(4,\), expected \(5,\)",
            (call, variables, [x[:2], x[:2, ..., :4]]),
            {},
        ),
        (
            TypeError,
            r"must return \(outputs, updates\)",
            (lambda *a, **k: call(*a, **k)[0], variables, cut(x)),
            {},
        ),
        (
            ValueError,
            "in training mode. Pass train to",
            (lambda *a, **k: call(*a, **{**k, "train": False}), variables, cut(x)),
            {},
        ),
    ]
    for kind, message, arguments, options in cases:
        with pytest.raises(kind, match=message):
            surgery.recompute(*arguments, **options)
    with pytest.raises(KeyError) as caught:
        surgery.recompute(lambda *a, **k: {}["image"], variables, cut(x))
    assert any("in batch 0" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("installed", [True, False])
def test_the_progress_bar_needs_a_terminal(installed, capsys, monkeypatch):
    layer, x = nn.BatchNorm(), drifting()
    if not installed:
        monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    arguments = (call_of(layer), start(layer, x), [x] * 7)
    surgery.recompute(*arguments)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    surgery.recompute(*arguments, progress=False)
    assert capsys.readouterr().err == ""
    surgery.recompute(*arguments)
    assert "7" in capsys.readouterr().err
