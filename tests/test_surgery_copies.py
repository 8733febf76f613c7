"""Batch norms that do not extend Flax's are handled or reported, never skipped."""

import weakref
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax.linen
from normjax import surgery
from tests import reference

pytestmark = pytest.mark.usefixtures("lenient")

EPS = np.finfo(np.float32).eps


def statistics(module, features, collection="batch_stats"):
    mean = module.variable(collection, "mean", jnp.zeros, features)
    return mean, module.variable(collection, "var", jnp.ones, features)


def normalized(module, x, mean, var, running, train):
    """The computation of all copies, as in old versions of Flax."""
    if train:
        axes = tuple(range(x.ndim - 1))
        batch_mean = x.mean(axes)
        batch_var = (x**2).mean(axes) - batch_mean**2
        axis_name = getattr(module, "axis_name", None)
        if axis_name is not None and not module.is_initializing():
            square = jax.lax.pmean(batch_var + batch_mean**2, axis_name)
            batch_mean = jax.lax.pmean(batch_mean, axis_name)
            batch_var = square - batch_mean**2
        if not module.is_initializing():
            for variable, new in zip(running, (batch_mean, batch_var), strict=True):
                variable.value = 0.9 * variable.value + 0.1 * new
        mean, var = batch_mean, batch_var
    return (x - mean) * jax.lax.rsqrt(var + 1e-5)


def by_field_or_argument(module, x, average):
    average = nn.merge_param("use_running_average", module.use_running_average, average)
    running = statistics(module, x.shape[-1])
    y = normalized(module, x, running[0].value, running[1].value, running, not average)
    scale = module.param("scale", nn.initializers.ones, x.shape[-1:])
    return y * scale + module.param("bias", nn.initializers.zeros, x.shape[-1:])


class FieldCopy(nn.Module):
    """The fields and names of Flax's, without inheritance (flaxmodels, ports of EfficientNet)."""

    use_running_average: bool | None = None
    axis: int = -1
    epsilon: float = 1e-5
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return by_field_or_argument(self, x, use_running_average)


class TrainCopy(nn.Module):
    """The switch is an argument `train`; parameters are made in setup, under other names."""

    features: int = 3

    def setup(self):
        self.gamma = self.param("gamma", nn.initializers.ones, (self.features,))
        self.running = statistics(self, self.features)

    def __call__(self, x, train=True):
        mean, var = self.running
        return self.gamma * normalized(self, x, mean.value, var.value, self.running, train)


class Doubled(FieldCopy):
    """Extends a copy, and calls it."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 2 * super().__call__(x, use_running_average)


class Rewritten(nn.BatchNorm):
    """Extends Flax's batch norm, and does not call it (CrossQ's batch renormalization)."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return by_field_or_argument(self, x, use_running_average)


class Observations(nn.Module):
    """Running mean and variance of inputs, without an argument for the mode."""

    collection: str = "batch_stats"

    @nn.compact
    def __call__(self, x, update=True):
        mean, var = statistics(self, x.shape[-1], self.collection)
        if update and self.is_mutable_collection(self.collection):
            mean.value += 1.0
        return (x - mean.value) / jnp.sqrt(var.value + 1e-5)


class Mixed(nn.Module):
    """A norm of Flax, and a copy."""

    other: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="own")(x)
        mode = {"train": train} if self.other is TrainCopy else {"use_running_average": not train}
        return self.other(name="other")(nn.relu(x) + 1, **mode)


COPIES = [FieldCopy, TrainCopy, Doubled, Rewritten]
X = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (16, 3)), jnp.float32)


def made(other):
    """A model, and variables whose statistics are not the initial ones."""
    model = Mixed(other)
    variables = model.init(jax.random.key(0), X, False)
    moved = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    return model, {**variables, "batch_stats": moved}


def call_of(model):
    def call(variables, batch, *, train, mutable=False):
        return model.apply(variables, batch, train, mutable=mutable)

    return call


@pytest.mark.parametrize("copy", COPIES)
def test_freeze_guarantee_copies_too(copy):
    model, variables = made(copy)
    frozen = surgery.freeze(model.apply)
    y, updates = frozen(variables, X, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, model.apply(variables, X, False))
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])

    def loss(params):
        return (frozen({**variables, "params": params}, X, True)[..., 0] ** 2).sum()

    assert not any(map(np.any, jax.tree.leaves(jax.grad(loss)(variables["params"]))))
    with pytest.raises(ValueError, match="'own' would run in training mode"):
        surgery.guard(model.apply)(variables, X, True, mutable=["batch_stats"])
    surgery.guard(frozen)(variables, X, True)


def test_init_of_a_model_of_copies_is_unchanged():
    init = surgery.freeze(FieldCopy(use_running_average=True).init)
    assert "batch_stats" in jax.eval_shape(init, jax.random.key(0), X)


@pytest.mark.parametrize("copy", COPIES)
def test_guard_edge_copy_of_batch_norm(copy):
    """Only the copy would run in training mode."""
    mode = {"train": True} if copy is TrainCopy else {"use_running_average": False}

    class Backbone(nn.Module):
        @nn.compact
        def __call__(self, x):
            return copy(name="copy")(nn.BatchNorm(use_running_average=True)(x), **mode)

    model = Backbone()
    variables = jax.tree.map(lambda leaf: leaf + 0.5, model.init(jax.random.key(0), X))
    with pytest.raises(ValueError, match="guard: the batch norm at 'copy' would run in training"):
        surgery.guard(model.apply)(variables, X, mutable=["batch_stats"])


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_measured(copy):
    """One batch, against float64; the report has both layers."""
    model, variables = made(copy)
    new = surgery.recompute(call_of(model), variables, [X[:8], X[8:]], at="own")
    x = np.asarray(X, np.float64)
    np.testing.assert_allclose(new["batch_stats"]["own"]["mean"], x.mean(0), rtol=8 * EPS)

    new = surgery.recompute(call_of(model), variables, [X])["batch_stats"]["other"]
    own = reference.batch_norm(x, 1.0, 0.0, axes=(0,))
    seen = np.maximum(own.y, 0) + 1
    # The input is the output of a float32 norm, up to a few deviations: a hundred eps.
    np.testing.assert_allclose(new["mean"], seen.mean(0), rtol=100 * EPS)
    np.testing.assert_allclose(new["var"], seen.var(0), rtol=100 * EPS)

    report = surgery.diagnose(call_of(model), variables, [X])
    assert [norm.path for norm in report.norms] == ["own", "other"]


def test_copies_are_synchronized():
    model, variables = made(FieldCopy)
    apply = partial(surgery.synchronize(model.apply, "d"), mutable=["batch_stats"])
    parts, _ = jax.vmap(lambda x: apply(variables, x, True), axis_name="d")(X.reshape(4, 4, 3))
    own = reference.batch_norm(np.asarray(X, np.float64), 1.0, 0.0, axes=(0,)).y
    whole = reference.batch_norm(np.maximum(own, 0) + 1, 1.0, 0.0, axes=(0,)).y
    # The copy computes E[x^2] - E[x]^2 in float32.
    np.testing.assert_allclose(parts.reshape(16, 3), whole, atol=500 * EPS)
    model, variables = made(TrainCopy)
    with pytest.raises(ValueError, match="TrainCopy at 'other' has no field axis_name"):
        surgery.synchronize(model.apply, "d", at="other")(
            variables, X, True, mutable=["batch_stats"]
        )


TOOLS = [surgery.freeze, surgery.guard, partial(surgery.synchronize, axis_name="d")]


@pytest.mark.parametrize("collection", ["batch_stats", "moving"])
def test_freeze_edge_unrecognized_module_with_statistics(collection):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, name="own")(x)
            return Observations(collection, name="other")(x)

    model = Model()
    variables = model.init(jax.random.key(0), X, False)
    variables = {**variables, "batch_stats": jax.tree.map(jnp.ones_like, variables["batch_stats"])}
    for tool in (surgery.freeze, surgery.guard):
        with pytest.raises(ValueError, match=rf"Observations at 'other'.*'{collection}'.*at="):
            jax.eval_shape(partial(tool(model.apply), train=False), variables, X)
        jax.eval_shape(partial(tool(model.apply, at="own"), train=False), variables, X)
    if collection == "batch_stats":
        return
    with pytest.raises(ValueError, match="1 chosen .*'other' is a Observations that holds"):
        surgery.recompute(call_of(model), variables, [X])
    findings = surgery.diagnose(call_of(model), variables, [X]).findings
    assert ("other", "not measured", True) in [finding[:3] for finding in findings]
    new = surgery.recompute(call_of(model), variables, [X], at="own")
    assert new["batch_stats"]["own"]["mean"][0] != 1


def test_a_module_of_nnx_inside_of_linen_is_an_error():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, name="own")(x)
            options = dict(args=(3,), kwargs={"use_running_average": not train}, name="nnx")
            return nnx.bridge.ToLinen(nnx.BatchNorm, **options)(x)

    variables = Model().init(jax.random.key(0), X, False)
    with pytest.raises(ValueError, match="ToLinen at 'nnx'"):
        surgery.freeze(Model().apply)(variables, X, False)


@pytest.mark.parametrize("tool", TOOLS)
def test_models_that_are_not_linen_are_an_error(tool):
    net = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="got BatchNorm, expected a function that runs"):
        tool(nn.BatchNorm())
    for apply in (lambda x: net(x, use_running_average=True), jax.jit(jnp.cos)):
        for _ in range(2):
            with pytest.raises(
                ValueError, match="no module of flax.linen ran.*of flax.nnx is passed itself"
            ):
                tool(apply)(X)
    haiku = pytest.importorskip("haiku")
    norm = haiku.transform_with_state(
        lambda x: haiku.BatchNorm(True, True, 0.9)(x, is_training=True)
    )
    with pytest.raises(TypeError, match="got TransformedWithState, expected a function"):
        tool(norm)
    params, state = norm.init(None, X)
    with pytest.raises(ValueError, match=r"no module of flax.linen ran"):
        jax.eval_shape(lambda: tool(norm.apply)(params, state, None, X))


@pytest.mark.parametrize("tool", [surgery.recompute, surgery.diagnose])
def test_models_in_place_of_a_call_are_an_error(tool):
    model, variables = made(FieldCopy)
    with pytest.raises(TypeError, match="got a model of flax.nnx and variables, expected"):
        tool(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), variables, [X])
    for wrong in (model, variables):
        message = f"{tool.__name__}: got {type(wrong).__name__}, expected a function.*def call"
        with pytest.raises(TypeError, match=f"(?s){message}"):
            tool(wrong, variables, [X])
    norm = nn.BatchNorm()
    with pytest.raises(TypeError, match="(?s)does not take them.*'train'.*def call"):
        tool(norm.apply, norm.init(jax.random.key(0), X, True), [X])
    with pytest.raises(ValueError, match=r"no module of flax.linen ran"):
        tool(lambda v, x, train, mutable: (x, v), variables, [X])


def test_a_freed_model_leaves_no_edit():
    """A function without batch norms is an error, even if it has the id of a frozen one."""
    norm = nn.BatchNorm(use_running_average=True)
    bound = partial(norm.apply, norm.init(jax.random.key(0), X))
    frozen, alive, address = surgery.freeze(bound), weakref.ref(bound), id(bound)
    frozen(X)
    del bound, frozen
    assert alive() is None
    # One of these functions reuses the freed memory.
    plain = [partial(jnp.add, 1.0) for _ in range(1000)]
    again = [function for function in plain if id(function) == address]
    assert again, "no function has the old id"
    with pytest.raises(ValueError, match="no module of flax.linen ran"):
        surgery.freeze(again[0])(X)


def test_freeze_edge_at_inside_of_nn_jit():
    """Equal blocks under nn.jit share a trace: the path of the first must not be used for all."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, name="bn")(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, name="stem")(x)
            return jitted(name="two")(jitted(name="one")(x))

    model, jitted = Model(), nn.jit(Block)
    variables = model.init(jax.random.key(0), X)
    for at, message in (("one/*", "under nn.jit.*share one trace"), ("two/bn", "matches no")):
        with pytest.raises(ValueError, match=message):
            surgery.freeze(model.apply, at=at)(variables, X, mutable=["batch_stats"])
    surgery.freeze(model.apply, at="stem")(variables, X, mutable=["batch_stats"])


def test_synchronize_error_messages():
    model, _ = made(FieldCopy)
    for wrong in (0, ("d", 1)):
        with pytest.raises(TypeError, match=r"axis_name=.*expected the name of a mapped axis"):
            surgery.synchronize(model.apply, wrong)


def test_frozen_mask_without_params_is_an_error():
    stats = {"batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
    with pytest.raises(ValueError, match=r"frozen_mask: the variables have no 'params'"):
        surgery.frozen_mask(stats)


def test_layers_of_normjax_are_not_copies():
    """A subclass that calls its parent is measured once."""

    class Shifted(normjax.linen.BatchNorm):
        @nn.compact
        def __call__(self, x, use_running_average=None):
            return super().__call__(x + 1, use_running_average)

    layer = Shifted()
    variables = layer.init(jax.random.key(0), X, True)

    def call(variables, batch, *, train, mutable=False):
        return layer.apply(variables, batch, not train, mutable=mutable)

    new = surgery.recompute(call, variables, [X])["batch_stats"]
    np.testing.assert_allclose(new["mean"], np.asarray(X, np.float64).mean(0) + 1, rtol=8 * EPS)
