"""normjax.linen.BatchNorm in place of flax.linen.BatchNorm, and what it adds."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ModifyScopeVariableError
from flax.serialization import from_bytes, to_bytes

import normjax.linen
from tests import reference
from tests.reference import EPS

pytestmark = pytest.mark.usefixtures("lenient")
KEY = jax.random.key(0)


class Net(nn.Module):
    """A model as people write it: the norm is a field, the mode an argument."""

    norm: type
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, use_running_average):
        norm = partial(
            self.norm, use_running_average=use_running_average, momentum=0.9, dtype=self.dtype
        )
        x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False, dtype=self.dtype)(x)))
        x = norm(use_scale=False, axis=(1, -1), name="outer")(x)
        return nn.Dense(3)(norm(use_bias=False)(x).mean((1, 2)))


@pytest.fixture
def images(rng):
    return rng.normal(1, 2, (6, 5, 5, 2)).astype(np.float32)


def test_fields_are_those_of_flax_in_their_order():
    ours = [
        f for f in dataclasses.fields(normjax.linen.BatchNorm) if f.name not in ("parent", "name")
    ]
    flax = [f for f in dataclasses.fields(nn.BatchNorm) if f.name not in ("parent", "name")]
    ours, added = ours[: len(flax)], ours[len(flax) :]
    assert [f.name for f in ours] == [f.name for f in flax]
    assert [f.default for f in ours] == [f.default for f in flax]
    assert [f.name for f in added] == ["ddof", "debias", "virtual_batch_size"]


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_model_changes_one_import(images, dtype):
    """Same variables from the same key, same output, same statistics, same gradients."""
    results = []
    for norm in (nn.BatchNorm, normjax.linen.BatchNorm):
        model = Net(norm, dtype)
        variables = model.init(KEY, images, use_running_average=False)

        @jax.jit
        def step(variables, model=model):
            def loss(params):
                y, updates = model.apply(
                    {**variables, "params": params},
                    images,
                    use_running_average=False,
                    mutable="batch_stats",
                )
                return jnp.sum(y**2), (y, updates)

            (_, (y, updates)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            served = model.apply({**variables, **updates}, images, use_running_average=True)
            return {"y": y, "updates": updates, "grads": grads, "served": served}

        results.append((variables, step(variables)))
    (flax_variables, flax), (our_variables, ours) = results
    jax.tree.map(np.testing.assert_array_equal, our_variables, flax_variables)
    # Three layers deep and squared; the statistics of flax round differently.
    tolerance = 2e-4 if dtype is None else 30 * EPS["bfloat16"]

    def close(a, b):
        assert a.dtype == b.dtype
        scale = max(1, np.abs(np.asarray(b, np.float32)).max())
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance * scale
        )

    jax.tree.map(close, ours, flax)


def test_checkpoints_load_both_ways(images):
    flax, ours = Net(nn.BatchNorm), Net(normjax.linen.BatchNorm)
    for writer, reader in ((flax, ours), (ours, flax)):
        variables = writer.init(KEY, images, use_running_average=False)
        _, updates = writer.apply(
            variables, images, use_running_average=False, mutable=["batch_stats"]
        )
        trained = {**variables, **updates}
        file = to_bytes(trained)
        empty = reader.init(jax.random.key(1), images, use_running_average=False)
        loaded = from_bytes(empty, file)
        want = writer.apply(trained, images, use_running_average=True)
        got = reader.apply(loaded, images, use_running_average=True)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
        ("float16", "float32", "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("complex64", None, "float32"),
    ],
)
def test_dtype_rules_are_those_of_flax(rng, x_dtype, dtype, param_dtype):
    x = jnp.asarray(rng.normal(size=(8, 3)), x_dtype)
    results = []
    for norm in (nn.BatchNorm, normjax.linen.BatchNorm):
        module = norm(dtype=dtype, param_dtype=param_dtype)
        variables = module.init(KEY, x, use_running_average=False)
        y, updates = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        results.append((variables, y, updates))
    flax, ours = results

    def close(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        comparable = np.complex64 if jnp.iscomplexobj(a) else np.float32
        atol = 4 * float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(a).astype(comparable), np.asarray(b).astype(comparable), atol=4 * atol
        )

    jax.tree.map(close, ours, flax)


def test_init_needs_no_axis_and_updates_no_statistics(images):
    module = normjax.linen.BatchNorm(axis_name="unbound", axis_index_groups=[[0], [1]])
    for train in (True, False):
        y, variables = module.init_with_output(KEY, images, train=train)
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(2))
        np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(2))
    flax_y, _ = nn.BatchNorm().init_with_output(KEY, images, use_running_average=False)
    y, _ = module.init_with_output(KEY, images, train=True)
    np.testing.assert_allclose(y, flax_y, atol=1e-5)


def test_init_takes_a_batch_of_one():
    normjax.linen.BatchNorm().init(KEY, jnp.ones((1, 3)), train=True)


def test_train_is_the_opposite_of_use_running_average(images):
    module = normjax.linen.BatchNorm()
    variables = module.init(KEY, images, train=False)
    apply = partial(module.apply, variables, images, mutable=["batch_stats"])
    for a, b in (
        (apply(train=True), apply(use_running_average=False)),
        (apply(train=False), apply(use_running_average=True)),
        (apply(train=True), apply(False)),
    ):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_no_mode_and_two_modes_are_errors(images):
    variables = normjax.linen.BatchNorm().init(KEY, images, train=False)
    with pytest.raises(ValueError, match=r"no mode was given.*Pass train=True.*or train=False"):
        normjax.linen.BatchNorm().apply(variables, images)
    for at_construction, at_call in (
        ({}, dict(train=True, use_running_average=False)),
        (dict(use_running_average=True), dict(train=False)),
        (dict(use_running_average=True), dict(use_running_average=True)),
    ):
        with pytest.raises(ValueError, match=r"which are one switch .* Give one of them"):
            normjax.linen.BatchNorm(**at_construction).apply(variables, images, **at_call)
    with pytest.raises(
        TypeError, match='train is traced by jit, expected True or False.*static_argnames="train"'
    ):
        jax.jit(lambda t: normjax.linen.BatchNorm().apply(variables, images, train=t))(True)


def test_training_without_mutable_says_what_to_write(images):
    model = Net(normjax.linen.BatchNorm)
    variables = model.init(KEY, images, use_running_average=False)
    message = r"at '/BatchNorm_0': use_running_average=F.* updates .* mutable=\['batch_stats'\]"
    with pytest.raises(ModifyScopeVariableError, match=message):
        model.apply(variables, images, use_running_average=False)


def test_an_unbound_axis_says_which_are_bound(images):
    module = normjax.linen.BatchNorm(axis_name="batch")
    variables = module.init(KEY, images, train=False)
    step = partial(module.apply, variables, train=True, mutable=["batch_stats"])
    with pytest.raises(
        NameError, match=r"'batch' is not bound here; bound are: none.*Under plain jit"
    ):
        jax.jit(step)(images)
    with pytest.raises(NameError, match=r"bound are: 'data'"):
        jax.vmap(step, axis_name="data")(images[None])


def test_a_wrong_axis_is_named(images):
    with pytest.raises(ValueError, match=r"axis=4 is out of range for x with shape \(6, 5, 5, 2\)"):
        normjax.linen.BatchNorm(axis=4).init(KEY, images, train=False)


def test_masks_reach_the_function(rng):
    x = rng.normal(size=(6, 3)).astype(np.float32)
    mask = np.array([1, 1, 0, 1, 0, 1])[:, None]
    module = normjax.linen.BatchNorm(momentum=0.0)
    variables = module.init(KEY, x, train=False)
    for kind in (bool, np.int32, np.float32):  # flax reads any nonzero as True
        y, updates = module.apply(
            variables, x, train=True, mask=mask.astype(kind), mutable=["batch_stats"]
        )
        want = reference.batch_norm(x, axes=(0,), mask=mask.astype(bool))
        np.testing.assert_allclose(y, want.y, atol=1e-5)
        np.testing.assert_allclose(updates["batch_stats"]["var"], want.var, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "mean", "var"),
    [
        (dict(momentum=0.9), 0.1, 0.9 + 0.1 * 2),
        (dict(momentum=0.9, ddof=1), 0.1, 0.9 + 0.1 * 3),
        (dict(momentum=None), 1, 2),
        (dict(momentum=0.9, debias=True), 1, 2),
    ],
)
def test_ddof_debias_and_cumulative_average(options, mean, var):
    x = jnp.array([[0.0], [0.0], [3.0]])  # mean 1, biased variance 2, unbiased 3
    module = normjax.linen.BatchNorm(**options)
    variables = module.init(KEY, x, train=True)
    counted = options.get("debias", False) or options["momentum"] is None
    assert ("count" in variables["batch_stats"]) == counted
    assert not counted or variables["batch_stats"]["count"].dtype == jnp.int32
    _, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["mean"], [mean], rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], [var], rtol=1e-6)


@pytest.mark.parametrize("options", [dict(debias=True), dict(momentum=None)])
def test_a_checkpoint_without_a_count_is_refused_in_training(images, options):
    variables = nn.BatchNorm().init(KEY, images, use_running_average=True)
    loaded = {**variables, "batch_stats": {"mean": jnp.full(2, 100.0), "var": jnp.full(2, 50.0)}}
    module = normjax.linen.BatchNorm(**options)
    with pytest.raises(ValueError, match=r"need batch_stats/count.* Add count"):
        module.apply(loaded, images, train=True, mutable=["batch_stats"])
    want = nn.BatchNorm().apply(loaded, images, use_running_average=True)
    np.testing.assert_allclose(module.apply(loaded, images, train=False), want, atol=1e-5)


def test_interceptors_see_one_call(images):
    seen = []

    def note(run, args, kwargs, context):
        seen.append(context.method_name)
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        normjax.linen.BatchNorm().init(KEY, images, train=False)
    assert seen == ["__call__"]


def test_fields_that_pick_a_less_exact_algorithm_have_no_effect(rng):
    x = rng.normal(1e3, 1, (16, 3)).astype(jnp.bfloat16)
    outputs = [
        normjax.linen.BatchNorm(
            use_fast_variance=fast, force_float32_reductions=force
        ).init_with_output(KEY, x, train=True)
        for fast in (True, False)
        for force in (True, False)
    ]
    for other in outputs[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, outputs[0])


class Twice(nn.Module):
    """One norm, called twice: the statistics are updated twice."""

    @nn.compact
    def __call__(self, x):
        norm = normjax.linen.BatchNorm(momentum=0.5)
        return norm(norm(x, train=True) + 3, train=True)


def test_a_reused_module_updates_its_statistics_at_each_call(rng):
    x = rng.normal(5, 2, (64, 2)).astype(np.float32)
    variables = Twice().init(KEY, x)
    _, updates = Twice().apply(variables, x, mutable=["batch_stats"])
    want = 0.5 * (0.5 * x.mean(0)) + 0.5 * 3
    np.testing.assert_allclose(updates["batch_stats"]["BatchNorm_0"]["mean"], want, rtol=1e-4)


def test_vmap_over_the_module(rng):
    """An ensemble: statistics and parameters of its own for each member."""
    x = rng.normal(2, 3, (3, 8, 2)).astype(np.float32)
    ensemble = nn.vmap(
        normjax.linen.BatchNorm,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )(momentum=0.0, use_running_average=False)
    variables = ensemble.init(KEY, x)
    y, updates = ensemble.apply(variables, x, mutable=["batch_stats"])
    for member in range(3):
        want = reference.batch_norm(x[member], axes=(0,))
        np.testing.assert_allclose(y[member], want.y, atol=1e-5)
        np.testing.assert_allclose(updates["batch_stats"]["mean"][member], want.mean, rtol=1e-5)


def test_vmap_over_the_module_with_a_shared_axis(rng):
    x = rng.normal(2, 3, (4, 8, 2)).astype(np.float32)
    shared = nn.vmap(
        normjax.linen.BatchNorm,
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="member",
    )(use_running_average=False, axis_name="member", momentum=0.0)
    variables = shared.init(KEY, x)
    y, updates = shared.apply(variables, x, mutable=["batch_stats"])
    want = reference.batch_norm(x, axes=(0, 1))
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], want.var, rtol=1e-5)


class Layer(nn.Module):
    """A carry for nn.scan."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(normjax.linen.BatchNorm(use_running_average=False)(nn.Dense(3)(x))), None


def test_scan_over_layers(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    stack = nn.scan(
        Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=4
    )()
    variables = stack.init(KEY, x, None)
    (y, _), updates = stack.apply(variables, x, None, mutable=["batch_stats"])
    assert updates["batch_stats"]["BatchNorm_0"]["mean"].shape == (4, 3)
    for i in range(4):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        (x, _), updated = Layer().apply(one, x, None, mutable=["batch_stats"])
        np.testing.assert_allclose(
            updates["batch_stats"]["BatchNorm_0"]["var"][i],
            updated["batch_stats"]["BatchNorm_0"]["var"],
            rtol=1e-5,
        )
    np.testing.assert_allclose(y, x, atol=1e-4)


def test_remat_over_the_module(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    plain, remat = Layer(), nn.remat(Layer)()
    variables = plain.init(KEY, x, None)
    results = []
    for module in (plain, remat):

        def loss(params, module=module):
            (y, _), updates = module.apply(
                {**variables, "params": params}, x, None, mutable=["batch_stats"]
            )
            return jnp.sum(y**2), updates

        results.append(jax.grad(loss, has_aux=True)(variables["params"]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), *results)


def test_pmap_keeps_one_state_on_all_devices(rng):
    x = rng.normal(2, 3, (4, 8, 2)).astype(np.float32)
    module = normjax.linen.BatchNorm(axis_name="d", momentum=0.0)
    variables = module.init(KEY, x[0], train=True)
    y, updates = jax.pmap(
        lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"]), "d"
    )(x)
    want = reference.batch_norm(x, axes=(0, 1))
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    for device in range(4):
        np.testing.assert_allclose(updates["batch_stats"]["var"][device], want.var, rtol=1e-5)


def test_setup_modules_work_too(images):
    class Model(nn.Module):
        def setup(self):
            self.norm = normjax.linen.BatchNorm()

        def __call__(self, x, train):
            return self.norm(x, train=train)

    variables = Model().init(KEY, images, train=True)
    assert variables["batch_stats"]["norm"]["mean"].shape == (2,)
