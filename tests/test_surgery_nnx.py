"""The tools on models of flax.nnx. Each tool is applied to three models that import only Flax."""

import pickle
import warnings
from types import SimpleNamespace
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax
import normjax.nnx
from normjax import surgery
from tests import nnx_torch
from tests.nnx_models import MODELS, ResNet

every_model = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.usefixtures("lenient")  # for flax's own norms


def images(seed, n=8):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0.5, 2.0, (n, 16, 16, 3)), jnp.float32)


BATCHES = [images(seed) for seed in range(3)]
HEALTHY = [images(seed, 64) for seed in range(2)]


def is_norm(module):
    return isinstance(module, (nnx.BatchNorm, normjax.nnx.BatchNorm))


def norms(model):
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if is_norm(module)
    }


def statistics(model):
    return {
        path: (np.asarray(norm.mean[...]), np.asarray(norm.var[...]))
        for path, norm in norms(model).items()
    }


def evaluated(model, x):
    copy = nnx.clone(model)
    copy.eval()
    return copy(x)


@pytest.fixture(scope="module")
def trained():
    """Each model, with statistics and affine parameters other than the initial ones."""
    models = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for name, kind in MODELS.items():
            model = kind(nnx.Rngs(0))
            rng = np.random.default_rng(0)
            for norm in norms(model).values():
                for vector in (norm.scale, norm.bias):
                    vector[...] += jnp.asarray(rng.normal(0, 0.2, vector.shape), jnp.float32)
            step = nnx.jit(lambda model, x: model(x))
            for x in BATCHES:
                step(model, x)
            models[name] = model
    return models


@every_model
def test_recompute_is_exact_and_changes_only_a_copy(trained, name):
    """Compares the first norm with float64 NumPy, the others with an update of momentum 0."""
    model = trained[name]
    before = statistics(model)
    new = surgery.recompute(model, BATCHES, progress=False)
    first = {"ResNet": ("bn1", "conv1"), "ConvNeXt": ("stem_norm", "stem")}
    norm, layer = first.get(name, ("stem_norm", "patches"))
    seen = np.concatenate([np.asarray(getattr(model, layer)(x), np.float64) for x in BATCHES])
    seen = seen.reshape(-1, seen.shape[-1])
    got = statistics(new)[norm]
    np.testing.assert_allclose(got[0], seen.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[1], seen.var(0), rtol=1e-6)
    for path, (mean, var) in statistics(model).items():
        np.testing.assert_array_equal(mean, before[path][0])
        np.testing.assert_array_equal(var, before[path][1])
    # With momentum 0, one batch of all data gives the same running statistics.
    whole = nnx.clone(model)
    for norm in norms(whole).values():
        norm.momentum = 0.0
    once = surgery.recompute(model, [jnp.concatenate(BATCHES)], progress=False)
    whole.train()
    whole(jnp.concatenate(BATCHES))
    for path, (mean, var) in statistics(whole).items():
        np.testing.assert_allclose(statistics(once)[path][0], mean, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(statistics(once)[path][1], var, rtol=1e-5, atol=2e-6)


def test_recompute_by_a_function_where_the_model_cannot_be_called():
    model = ResNet(nnx.Rngs(0))
    pairs = [(x, None) for x in BATCHES]
    by_function = surgery.recompute(
        lambda model, batch: model(batch[0]), model, pairs, progress=False
    )
    by_itself = surgery.recompute(model, BATCHES, progress=False)
    for one, other in zip(
        jax.tree.leaves(nnx.state(by_function)), jax.tree.leaves(nnx.state(by_itself)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


SHIFT = 0.0


class Reading(nnx.Module):
    """A method that reads a global and an object that may change."""

    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.held = nnx.static(SimpleNamespace(shift=0.0))

    def moved(self, x):
        return x + SHIFT + self.held.shift

    def __call__(self, x):
        return self.norm(self.moved(x))


def test_a_changed_global_is_traced_again(monkeypatch):
    model = Reading()
    first = surgery.recompute(model, BATCHES, progress=False)
    monkeypatch.setattr("tests.test_surgery_nnx.SHIFT", 5.0)
    model.held.shift = 2.0
    shifted = surgery.recompute(model, BATCHES, progress=False)
    np.testing.assert_allclose(shifted.norm.mean[...], first.norm.mean[...] + 7, rtol=1e-5)


def test_a_model_is_compiled_once():
    traced = []

    def call(model, x):
        traced.append(x)
        return model(x)

    surgery.recompute(call, Reading(), BATCHES, progress=False)
    assert len(traced) == 1


def test_hijax_variables_are_unchanged():
    with nnx.var_defaults(hijax=True):
        model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    surgery.diagnose(model, [images(0)], progress=False)
    assert not np.any(model.mean.get_value())


def test_tools_run_inside_of_a_compiled_function(trained):
    reset = nnx.jit(lambda model: surgery.reset(model).bn1.mean[...])
    assert not np.any(reset(trained["ResNet"]))


class Registering(nnx.BatchNorm):
    """A base class that registers its subclasses by name."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        assert cls.__name__ not in Registering.known
        Registering.known[cls.__name__] = cls


class Registered(Registering):
    pass


def test_no_subclass_is_registered():
    layer = Registered(3, rngs=nnx.Rngs(0))
    assert isinstance(surgery.freeze(layer), Registered)
    surgery.diagnose(layer, [images(0)], progress=False)
    assert Registering.known == {"Registered": Registered}


@every_model
def test_a_frozen_model_has_no_gradient_and_ignores_train(trained, name):
    frozen = surgery.freeze(trained[name])
    frozen.train()
    before = statistics(frozen)
    y = frozen(BATCHES[0])
    np.testing.assert_allclose(y, evaluated(trained[name], BATCHES[0]), atol=2e-5)
    gradient = nnx.grad(lambda model: jnp.sum(model(BATCHES[0]) ** 2))(frozen)
    for path in norms(frozen):
        node = gradient
        for key in path.split("/"):
            node = node[int(key) if key.isdigit() else key]
        assert not np.any(node["scale"][...])
        assert not np.any(node["bias"][...])
    for path, (mean, var) in statistics(frozen).items():
        np.testing.assert_array_equal(mean, before[path][0])
        np.testing.assert_array_equal(var, before[path][1])
    # Filters by the class of Flax still find the layers, so the layers can be unfrozen.
    frozen.set_attributes(nnx.BatchNorm, frozen=False, use_running_average=False)
    frozen(BATCHES[0])
    assert any(np.any(mean != before[path][0]) for path, (mean, _) in statistics(frozen).items())
    assert not any(hasattr(norm, "frozen") for norm in norms(trained[name]).values())


def test_freeze_edge_frozen_layer_of_nnx_train_true():
    frozen = surgery.freeze(normjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    frozen.train()
    frozen(images(0))
    with pytest.raises(ValueError, match="train=True asks a frozen layer to train"):
        frozen(images(0), train=True)


def test_freeze_by_path(trained):
    frozen = surgery.freeze(trained["ResNet"], at="layer1/*")
    frozen.train()
    before = statistics(frozen)
    frozen(BATCHES[0])
    for path, (mean, _) in statistics(frozen).items():
        assert np.array_equal(mean, before[path][0]) == path.startswith("layer1/"), path


@every_model
def test_synchronize_equals_the_whole_batch(trained, name):
    whole = nnx.clone(trained[name])
    whole.train()
    x = jnp.concatenate(BATCHES[:2])
    want = whole(x)
    shared = surgery.synchronize(trained[name], "batch")
    shared.train()
    graphdef, state = nnx.split(shared)

    def step(state, x):
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model, nnx.BatchStat)

    step = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="batch"))
    y, stats = step(state, x.reshape(2, 8, *x.shape[1:]))
    np.testing.assert_allclose(y.reshape(want.shape), want, atol=5e-5)
    for got, expected in zip(
        jax.tree.leaves(stats), jax.tree.leaves(nnx.state(whole, nnx.BatchStat)), strict=True
    ):
        np.testing.assert_allclose(got[0], expected, rtol=2e-5, atol=2e-5)


@every_model
def test_fold_gives_the_same_output(trained, name):
    x = BATCHES[0]
    serve, folded, report = surgery.fold(trained[name], x)
    want = evaluated(trained[name], x)
    np.testing.assert_allclose(jax.jit(serve)(folded, x[:3]), want[:3], atol=1e-5)
    reported = len(report.folded) + len(report.alone)
    assert reported == len(norms(trained[name]))
    first = {"ResNet": ("conv1", "bn1"), "ConvNeXt": ("stem", "stem_norm")}
    assert first.get(name, ("patches", "stem_norm")) in report.folded


def test_fold_names_layers_by_their_paths(trained):
    _, _, report = surgery.fold(trained["ResNet"], BATCHES[0])
    assert ("layer2/0/downsample/0", "layer2/0/downsample/1") in report.folded


@every_model
def test_convert_gives_a_model_with_group_norms(trained, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = surgery.convert(trained[name])
    assert not norms(converted)
    groups = [m for _, m in nnx.iter_modules(converted) if isinstance(m, normjax.nnx.GroupNorm)]
    assert len(groups) == len(norms(trained[name]))
    converted.train()
    x = BATCHES[0]
    np.testing.assert_allclose(converted(x)[:2], converted(x[:2]), atol=2e-5)


def test_convert_equals_that_of_linen(trained):
    """The same scale and bias, which tests/test_surgery_convert.py compares with float64."""
    model = trained["ResNet"]
    converted = surgery.convert(model, num_groups=2)
    norm = model.bn1
    variables = {
        "params": {"bn": {"scale": norm.scale[...], "bias": norm.bias[...]}},
        "batch_stats": {"bn": {"mean": norm.mean[...], "var": norm.var[...]}},
    }
    want = surgery.convert(variables, num_groups=2)["params"]["bn"]
    np.testing.assert_array_equal(converted.bn1.scale[...], want["scale"])
    np.testing.assert_array_equal(converted.bn1.bias[...], want["bias"])


def test_convert_keeps_an_activation_and_accepts_a_mode():
    norm = normjax.nnx.BatchNormAct(4, activation=jax.nn.relu, rngs=nnx.Rngs(0))
    converted = surgery.convert(norm, num_groups=2)
    x = images(0)[..., :1] * jnp.ones(4)
    assert np.min(converted(x, use_running_average=True)) == 0
    np.testing.assert_array_equal(converted(x, train=True), converted(x, train=False))


@every_model
def test_reset_restores_the_initial_statistics(trained, name):
    for mean, var in statistics(surgery.reset(trained[name])).values():
        assert not np.any(mean)
        assert np.all(var == 1)
    assert all(np.any(mean) for mean, _ in statistics(trained[name]).values())


@every_model
def test_guard_accepts_and_refuses(trained, name):
    guarded = surgery.guard(trained[name])
    guarded.eval()
    np.testing.assert_allclose(guarded(BATCHES[0]), evaluated(trained[name], BATCHES[0]), atol=2e-5)
    guarded.train()
    with pytest.raises(ValueError, match="surgery.guard: the batch norm at .* in training mode"):
        nnx.jit(lambda model, x: model(x))(guarded, BATCHES[0])
    surgery.guard(surgery.freeze(trained[name]))(BATCHES[0])
    with pytest.raises(ValueError, match="never updated"):
        surgery.guard(surgery.reset(trained[name]))
    fresh = nnx.state(surgery.reset(trained[name]), nnx.BatchStat)
    nnx.update(guarded, fresh)
    guarded.eval()
    with pytest.raises(ValueError, match="never updated"):
        guarded(BATCHES[0])


@every_model
def test_diagnose_names_each_injected_fault(trained, name):
    healthy = surgery.recompute(trained[name], HEALTHY, progress=False)

    def kinds(model):
        report = surgery.diagnose(model, HEALTHY, progress=False)
        return {(f.path, f.kind) for f in report.findings}

    # By design, ConvNeXt and ViT have a bias before a norm, and few samples after a pooling.
    by_design = {"redundant bias", "few samples"}
    assert {kind for _, kind in kinds(healthy)} <= (by_design if name != "ResNet" else set())
    paths, faulty = list(norms(healthy)), nnx.clone(healthy)
    stale, broken, dead, large = list(norms(faulty).values())[:4]
    stale.mean[...] += 5
    broken.var[...] = broken.var[...].at[0].set(jnp.nan)
    dead.scale[...], dead.bias[...] = dead.scale[...].at[0].set(0), dead.bias[...] * 0
    large.scale[...] *= 1e4
    faults = ("stale", "not finite", "dead channels", "exploding")
    assert set(zip(paths, faults, strict=False)) <= kinds(faulty)
    path = paths[0]
    assert (path, "never updated") in kinds(surgery.reset(healthy))
    frozen = surgery.freeze(healthy, at=path)
    assert not {kind for at, kind in kinds(frozen) if at == path}


def test_a_redundant_bias_is_found():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.bn(self.conv(x))

    report = surgery.diagnose(Net(nnx.Rngs(0)), HEALTHY, progress=False)
    assert ("bn", "redundant bias") in {(f.path, f.kind) for f in report.findings}


@every_model
def test_masks_for_an_optimizer(trained, name):
    model = nnx.clone(trained[name])
    decays = surgery.decay_mask(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(decays):
        keys = [key.key for key in path if hasattr(key, "key")]
        assert leaf == (keys[-1] == "kernel"), path
    frozen = surgery.frozen_mask(model)
    marked = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)
        if leaf
    }
    assert len(marked) == 2 * len(norms(model))
    transform = optax.chain(
        optax.adamw(1e-2, weight_decay=0.5, mask=decays),
        optax.masked(optax.set_to_zero(), frozen),
    )
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    gradient = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    before = {path: np.asarray(norm.scale[...]) for path, norm in norms(model).items()}
    optimizer.update(model, gradient)
    for path, norm in norms(model).items():
        np.testing.assert_array_equal(norm.scale[...], before[path])


def test_lengths_decay_and_gains_do_not():
    rngs = nnx.Rngs(0)
    length = normjax.nnx.WeightNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs)
    gain = normjax.nnx.WeightStandardized(nnx.Linear(2, 3, rngs=rngs), use_gain=True, rngs=rngs)
    assert surgery.decay_mask(length)["scales"]["kernel",] is True
    assert surgery.decay_mask(gain)["gains"]["kernel",] is False
    for wrapped in (length, gain):
        assert surgery.decay_mask(wrapped)["layer_instance"] == {"bias": False, "kernel": True}


def test_tools_compose(trained):
    model = surgery.synchronize(surgery.freeze(trained["ResNet"], at="layer1/*"), "batch")
    assert {path for path, norm in norms(model).items() if norm.frozen} == {
        "layer1/0/bn1",
        "layer1/0/bn2",
    }
    assert all(norm.axis_name == "batch" for norm in norms(model).values())


@every_model
def test_export_and_import_are_the_identity(trained, name):
    model = trained[name]
    rules = rules_of(model)
    state = surgery.export_torch(model, rules)
    blank = surgery.reset(model)
    filled = surgery.import_torch(blank, state, rules)
    for got, want in zip(
        jax.tree.leaves(nnx.state(filled)), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def rules_of(model):
    """One rule for each layer, which has the same name in PyTorch."""
    kinds = {
        nnx.Conv: "conv",
        nnx.Linear: "linear",
        nnx.BatchNorm: "batch_norm",
        nnx.LayerNorm: "layer_norm",
        nnx.MultiHeadAttention: "attention",
    }
    layers = {"/".join(map(str, path)): type(m) for path, m in nnx.iter_modules(model)}
    rules = [(path, path.replace("/", "."), kinds[k]) for path, k in layers.items() if k in kinds]
    parameters = [
        "/".join(map(str, path))
        for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[-1] in ("gamma", "position")
    ]
    return rules + [(path, path.replace("/", "."), "parameter") for path in parameters]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@every_model
def test_import_torch_gives_the_outputs_of_the_twin(torch, name):
    torch.manual_seed(0)
    twin = nnx_torch.twins(torch)[name]().eval()
    with torch.no_grad():
        for key, array in twin.state_dict().items():
            if array.ndim == 1:
                low = 0.5 if key.endswith(("weight", "var")) else -0.5
                array.uniform_(low, low + 1)
    norm = {} if name == "ResNet" else {"norm": nnx.LayerNorm}
    model = MODELS[name](nnx.Rngs(0), **norm)
    filled = surgery.import_torch(model, twin.state_dict(), rules_of(model))
    x = np.asarray(BATCHES[0])
    with torch.no_grad():
        want = twin(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    np.testing.assert_allclose(evaluated(filled, x), want, rtol=1e-5, atol=1e-5)
    for key, array in surgery.export_torch(filled, rules_of(model)).items():
        np.testing.assert_array_equal(array, twin.state_dict()[key])


class Unrecognized(nnx.Module):
    """A batch norm of another author."""

    def __init__(self):
        self.mean, self.var = nnx.BatchStat(jnp.zeros(3)), nnx.BatchStat(jnp.ones(3))


class Holder(nnx.Module):
    def __init__(self):
        self.other = Unrecognized()
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize("tool", [surgery.freeze, surgery.guard, surgery.reset])
def test_unrecognized_norms_are_an_error_unless_excluded(tool):
    with pytest.raises(ValueError, match="Unrecognized at 'other' holds a mean and a var .* at="):
        tool(Holder())
    if tool is not surgery.guard:
        tool(Holder(), at="norm")
    with pytest.raises(ValueError, match="at='nrm' matches no batch norm.*'norm', 'other'"):
        tool(Holder(), at="nrm")
    with pytest.raises(ValueError, match="no batch norm, expected at least one"):
        tool(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


class Overriding(nnx.BatchNorm):
    """Overrides the call of Flax, which therefore cannot be frozen from outside."""

    def __call__(self, x):
        return super().__call__(x) + 1


def test_freeze_edge_copy_of_batch_norm_in_nnx():
    with pytest.raises(ValueError, match="Overriding at .*unless a subclass has a __call__"):
        surgery.freeze(Overriding(3, rngs=nnx.Rngs(0)))


class Activating(nnx.BatchNorm):
    """Adds a method to the norm of Flax."""

    def activated(self, x):
        return nnx.relu(self(x))


def test_a_subclass_of_flax_keeps_its_class():
    layer = surgery.recompute(Activating(3, rngs=nnx.Rngs(0)), [images(0)], progress=False)
    frozen = surgery.freeze(layer)
    assert isinstance(frozen, Activating)
    again = pickle.loads(pickle.dumps(frozen))
    np.testing.assert_array_equal(again.activated(images(0)), frozen.activated(images(0)))


class Ours(normjax.nnx.BatchNorm):
    """Overrides the call of normjax, with other arguments."""

    def __call__(self, inputs, training=False):
        return super().__call__(jnp.exp(inputs / 8) + 10, train=training) + 1


def test_a_subclass_of_normjax_runs_its_own_code():
    layer, x = Ours(3, rngs=nnx.Rngs(0)), images(0)
    new = surgery.recompute(lambda layer, x: layer(x, training=True), layer, [x], progress=False)
    seen = np.exp(np.asarray(x, np.float64) / 8) + 10
    np.testing.assert_allclose(new.mean[...], seen.mean((0, 1, 2)), rtol=1e-6)
    assert isinstance(surgery.freeze(new), Ours)
    with pytest.raises(ValueError, match="would run in training mode"):
        surgery.guard(new)(x, training=True)
    with pytest.raises(ValueError, match="the Ours at '' has a __call__ of its own"):
        surgery.convert(new, num_groups=1)


def test_guards_compose():
    layer = surgery.recompute(normjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), [images(0)])
    guarded = surgery.guard(surgery.guard(layer))
    new = surgery.recompute(guarded, [images(1)], progress=False)
    copy = pickle.loads(pickle.dumps(new))
    copy.train()
    with pytest.raises(ValueError, match="would run in training mode"):
        copy(images(0))


def over_devices(model, batch):
    """A function that binds the axis itself."""
    mapped = nnx.vmap(lambda model, x: model(x), in_axes=(None, 0), axis_name="batch")
    return mapped(model, batch.reshape(4, -1, *batch.shape[1:]))


def test_statistics_are_shared_over_an_axis_bound_by_the_call():
    shared = surgery.synchronize(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), "batch")
    new = surgery.recompute(over_devices, shared, BATCHES, progress=False)
    want = np.concatenate([np.asarray(x, np.float64).reshape(-1, 3) for x in BATCHES])
    np.testing.assert_allclose(new.mean[...], want.mean(0), rtol=1e-6)
    np.testing.assert_allclose(new.var[...], want.var(0), rtol=1e-6)
    surgery.diagnose(over_devices, new, BATCHES, progress=False).raise_if_serious()
    # If no axis is bound, the statistics are those of the whole batch.
    alone = surgery.recompute(shared, BATCHES, progress=False)
    np.testing.assert_allclose(alone.var[...], want.var(0), rtol=1e-6)


class OfLinen(nn.Module):
    normed: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        return nn.BatchNorm(use_running_average=True)(x) if self.normed else x


class Mixed(nnx.Module):
    def __init__(self, normed):
        self.linen = nnx.bridge.ToNNX(OfLinen(normed), rngs=nnx.Rngs(0)).lazy_init(images(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linen(x))


@pytest.mark.parametrize("tool", [surgery.freeze, surgery.guard, surgery.reset, surgery.convert])
def test_a_batch_norm_of_linen_inside_is_an_error(tool):
    with pytest.raises(ValueError, match="at 'linen/BatchNorm_0' holds a mean .* not those of lin"):
        tool(Mixed(True))
    with pytest.raises(ValueError, match="at 'linen/BatchNorm_0'"):
        surgery.recompute(Mixed(True), BATCHES, progress=False)


def test_a_module_of_linen_inside_is_folded():
    model = surgery.recompute(Mixed(False), BATCHES, progress=False)
    serve, folded, report = surgery.fold(model, BATCHES[0])
    assert len(report.folded) == 1
    np.testing.assert_allclose(serve(folded, BATCHES[0]), evaluated(model, BATCHES[0]), atol=1e-5)


@pytest.mark.parametrize("tool", [surgery.recompute, surgery.diagnose])
def test_unrecognized_norms_may_be_excluded_from_a_run(tool):
    tool(Holder(), BATCHES, at="norm", progress=False)
    with pytest.raises(ValueError, match="Unrecognized at 'other'"):
        tool(Holder(), BATCHES, progress=False)


class Dropping(nnx.Module):
    """Channels that are dropped for a whole batch."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.drop = nnx.Dropout(0.5, broadcast_dims=(0, 1, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.drop(x))


def test_each_batch_has_its_own_dropout():
    model = Dropping()
    first, again = (surgery.recompute(model, [images(0)] * 30, progress=False) for _ in range(2))
    # Channels are 0 in half of the batches and doubled in the others.
    assert np.all(np.asarray(first.norm.var[...]) > 4)
    np.testing.assert_array_equal(first.norm.var[...], again.norm.var[...])


def test_variables_of_several_arrays_are_unchanged():
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    model.pair = nnx.Param((jnp.ones(2), jnp.zeros(2)))
    model.tree = nnx.BatchStat({"a": jnp.ones(2)})
    new = surgery.recompute(surgery.reset(model), BATCHES, progress=False)
    assert new.pair.get_value()[0] is model.pair.get_value()[0]
    assert new.tree.get_value()["a"] is model.tree.get_value()["a"]


def test_imported_arrays_keep_the_sharding():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, "d"))
    model = nnx.Linear(2, 8, rngs=nnx.Rngs(0))
    model.kernel.set_value(jax.device_put(model.kernel.get_value(), place))
    state = {"weight": np.ones((8, 2), np.float32), "bias": np.ones(8, np.float32)}
    filled = surgery.import_torch(model, state, [("", "", "linear")])
    assert filled.kernel.get_value().sharding == place


def test_several_feature_axes_are_measured():
    layer, x = normjax.nnx.BatchNorm(24, axis=(1, 2), rngs=nnx.Rngs(0)), images(0)[..., 0]
    x = x[:, :4, :6]
    new = surgery.recompute(layer, [x], progress=False)
    np.testing.assert_allclose(new.mean[...], np.asarray(x).mean(0).ravel(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"at '' has axis=\(1, 2\), expected one axis"):
        surgery.convert(layer, num_groups=2)


def test_an_abstract_model_is_filled_or_an_error():
    abstract = nnx.eval_shape(lambda: ResNet(nnx.Rngs(0)))
    rules = rules_of(abstract)
    state = surgery.export_torch(ResNet(nnx.Rngs(0)), rules)
    filled = surgery.import_torch(abstract, state, rules)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(filled)))
    for tool in (surgery.reset, surgery.convert, lambda model: surgery.recompute(model, BATCHES)):
        with pytest.raises(ValueError, match="mean is ShapeDtypeStruct, expected an array"):
            tool(abstract)
    dropping = nnx.eval_shape(Dropping)
    state = surgery.export_torch(Dropping(), [("norm", "norm", "batch_norm")])
    with pytest.raises(ValueError, match=r"'drop/rngs/count'.* would stay abstract"):
        surgery.import_torch(dropping, state, [("norm", "norm", "batch_norm")])


def test_a_shared_parameter_is_frozen_at_each_of_its_layers():
    model = nnx.Sequential(*(nnx.BatchNorm(3, rngs=nnx.Rngs(i)) for i in range(2)))
    first, second = model.layers
    second.scale, second.bias = first.scale, first.bias
    for at in ("layers/0", "layers/1"):
        assert all(jax.tree.leaves(surgery.frozen_mask(model, at=at)))


@pytest.mark.parametrize("tool", [surgery.reset, lambda m: surgery.recompute(m, [images(0)])])
def test_moments_of_the_old_statistics_are_dropped(tool):
    layer = normjax.nnx.BatchNorm(3, accumulate=True, rngs=nnx.Rngs(0))
    layer(images(0) + 100)
    assert not np.any(tool(layer).moments.get_value().count)
    assert np.all(layer.moments.get_value().count)


@pytest.mark.parametrize("tool", [surgery.recompute, surgery.diagnose])
def test_error_messages(tool):
    model = ResNet(nnx.Rngs(0))
    for given, error, message in (
        ((model,), TypeError, "got no batches, expected .*\\(model, batches\\)"),
        ((model, BATCHES[0]), TypeError, "batches is an array of shape"),
        ((model, []), ValueError, "the batches are empty"),
        ((model, {}, BATCHES), TypeError, "got a model of flax.nnx and variables"),
        ((model, [(BATCHES[0], 1.0)]), TypeError, r"lambda model, batch: model\(batch\[0\]\)"),
    ):
        with pytest.raises(error, match=f"surgery.{tool.__name__}: .*{message}"):
            tool(*given, progress=False)


@pytest.mark.parametrize(
    "tool", [surgery.freeze, surgery.guard, surgery.reset, surgery.convert, surgery.frozen_mask]
)
def test_a_class_or_a_state_is_not_a_model(tool):
    with pytest.raises(TypeError, match="got the class ResNet, expected a model"):
        tool(ResNet)
    with pytest.raises(TypeError, match=r"got a State of flax.nnx, .* nnx.merge\(graphdef"):
        tool(nnx.state(ResNet(nnx.Rngs(0))))


def test_the_report_of_a_frozen_model_is_empty():
    report = surgery.diagnose(surgery.freeze(ResNet(nnx.Rngs(0))), BATCHES, progress=False)
    assert not report.norms
    assert "healthy" not in str(report)


def test_recompute_edge_model_of_nnx_that_is_frozen_whole():
    model = surgery.freeze(ResNet(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="ran none of the batch norms .* Check whether it is froz"):
        surgery.recompute(model, BATCHES, progress=False)
