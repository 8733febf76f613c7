"""Batch norm and activation that keep their output alone; the policy that keeps inputs of norms."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normjax
import normjax.linen
from normjax import ELU, BatchStats, LeakyReLU, batch_norm, batch_norm_act
from tests.reference import EPS

ACTIVATIONS = {
    LeakyReLU(): nn.leaky_relu,
    LeakyReLU(2.0): partial(nn.leaky_relu, negative_slope=2.0),
    ELU(): nn.elu,
    ELU(0.5): partial(nn.elu, alpha=0.5),
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture
def data(rng):
    x = jnp.asarray(rng.normal(1, 2, (8, 5, 3)), jnp.float32)
    return x, jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, -1.0])


def inverted(activation, **options):
    """The loss by `batch_norm_act`, not linear in z, with its new statistics."""

    def loss(x, scale, bias):
        stats = BatchStats.make(3)
        z, stats = batch_norm_act(
            x, stats, scale, bias, train=True, activation=activation, **options
        )
        return jnp.sum(jnp.sin(z)), stats

    return loss


def plain(activation, **options):
    """The same by batch norm and the activation of Flax."""

    def loss(x, scale, bias):
        y, stats = batch_norm(x, BatchStats.make(3), scale, bias, train=True, **options)
        return jnp.sum(jnp.sin(ACTIVATIONS[activation](y))), stats

    return loss


@every_activation
def test_batch_norm_act_guarantee_same_result(activation, data, x64):
    """Value, statistics, first derivatives by both modes and second ones, in float64."""
    data = [np.asarray(v, np.float64) for v in data]
    mask = np.arange(8).reshape(8, 1, 1) < 6

    def first(loss):
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*data)

    def pushed(loss):
        return jax.jvp(lambda *v: loss(*v)[0], data, data)

    def second(loss):
        inner = jax.grad(lambda *v: loss(*v)[0])
        return jax.grad(lambda *v: jnp.sum(inner(*v) ** 2), (0, 1, 2))(*data)

    for options in ({}, {"mask": mask}):
        for view in (first, pushed, second):
            ours, theirs = (
                jax.tree.leaves(view(f(activation, **options))) for f in (inverted, plain)
            )
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_batch_norm_act_guarantee_light_backward(data, saved_arrays):
    x, scale, bias = data
    for dtype in (jnp.float32, jnp.bfloat16):
        own = x.astype(dtype)
        kept = saved_arrays(lambda *v: inverted(LeakyReLU())(*v)[0], own, scale, bias)
        # The output, and what the sine keeps of it.
        large = [k for k in kept if k.size >= x.size]
        assert len(large) <= 2
        assert all(k.dtype == dtype for k in large)
    z_only = saved_arrays(lambda x: batch_norm_act(x, None, train=True)[0], x)
    assert sum(k.size >= x.size for k in z_only) == 1


def test_batch_norm_act_edge_scale_0(data):
    x, scale, bias = data
    gradients = jax.grad(lambda *v: inverted(LeakyReLU())(*v)[0], (0, 1, 2))(x, scale * 0, bias)
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[1], 0)


@every_activation
def test_the_inverse_inverts(activation, rng):
    y = np.linspace(-5, 5, 101, dtype=np.float32)
    z = activation(jnp.asarray(y))
    np.testing.assert_allclose(z, ACTIVATIONS[activation](y), rtol=4 * EPS["float32"])
    # exp(-5) is what is left of y beside 1.
    np.testing.assert_allclose(
        activation.inverse(z),
        y,
        rtol=1e-4 if isinstance(activation, ELU) else 4 * EPS["float32"],
        atol=1e-6,
    )


def test_an_elu_that_has_lost_its_input_has_finite_gradients():
    def loss(x):
        z, _ = batch_norm_act(x, None, jnp.full(1, 50.0), train=True, activation=ELU())
        return jnp.sum(z**2)

    assert np.isfinite(jax.grad(loss)(jnp.array([[-1e3], [1.0], [2.0], [3.0]]))).all()


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_shared_over_devices_it_equals_the_whole_batch(how, data):
    x, scale, bias = data
    whole = jax.grad(lambda *v: inverted(ELU())(*v)[0], (0, 1, 2))(x, scale, bias)
    shared = inverted(ELU(), axis_name="d")

    def local(x, scale, bias):
        return jax.grad(lambda *v: jax.lax.psum(shared(*v)[0], "d"), (0, 1, 2))(x, scale, bias)

    if how == "shard_map":
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        specs = P("d"), P(), P()
        got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))(
            x, scale, bias
        )
    else:

        def loss(x, scale, bias):
            return jnp.sum(jax.vmap(lambda x: shared(x, scale, bias)[0], axis_name="d")(x))

        got = jax.grad(loss, (0, 1, 2))(x.reshape(4, 2, 5, 3), scale, bias)
    for a, b in zip(got, whole, strict=True):
        np.testing.assert_allclose(np.reshape(a, np.shape(b)), b, rtol=1e-4, atol=1e-4)


class Stack(nn.Module):
    """Convolutions with batch norm and activation in between, scanned over the depth or not."""

    norm: type[nn.Module]
    policy: object = None
    scanned: bool = True

    @nn.compact
    def __call__(self, x):
        body = Layer if self.policy is None else nn.remat(Layer, policy=self.policy)
        if not self.scanned:
            for i in range(8):
                x, _ = body(self.norm, name=f"layer_{i}")(x, None)
            return x
        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(body, axes, split_rngs={"params": True}, length=8)(self.norm, name="layers")(
            x, None
        )[0]


class Layer(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        x = self.norm(use_running_average=False, name="norm")(x)
        return (x if self.norm is normjax.linen.BatchNormAct else nn.leaky_relu(x)), None


def step(model, variables, x):
    """The compiled step: temporary bytes, loss and gradients."""

    def loss(params):
        y, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.mean(y**2)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(variables["params"]).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled(variables["params"])


def test_norm_inputs_saveable_guarantee_same_result(rng):
    """And a scanned stack needs less memory than with Flax's norm, by both ways of saving it."""
    x = jnp.asarray(rng.normal(size=(4, 12, 12, 8)), jnp.float32)
    models = {
        "flax": Stack(nn.BatchNorm),
        "act": Stack(normjax.linen.BatchNormAct),
        "policy": Stack(normjax.linen.BatchNorm, normjax.norm_inputs_saveable),
    }
    variables = models["flax"].init(jax.random.key(0), x)
    found = {name: step(model, variables, x) for name, model in models.items()}
    most, (loss, gradients) = found["flax"]
    for name, share in (("act", 0.7), ("policy", 0.75)):
        memory, (own_loss, own_gradients) = found[name]
        assert memory <= share * most
        assert float(own_loss) == pytest.approx(float(loss), rel=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (own_gradients, gradients)), strict=True):
            np.testing.assert_allclose(*map(np.asarray, (a, b)), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="its compiler fuses other things")
def test_a_stack_written_out_needs_less_memory_with_the_policy():
    """One x a block: not one as it is, and beside it one that was rounded to be kept."""
    x = jnp.ones((4, 12, 12, 8))
    flax = Stack(nn.BatchNorm, scanned=False)
    lean = Stack(normjax.linen.BatchNorm, normjax.norm_inputs_saveable, scanned=False)
    variables = flax.init(jax.random.key(0), x)
    assert step(lean, variables, x)[0] <= 0.75 * step(flax, variables, x)[0]


def test_norm_inputs_saveable_guarantee_nothing_twice(data):
    x, scale, bias = data

    def loss(x):
        return jnp.sum(jnp.sin(batch_norm(x, None, scale, bias, train=True, axis_name="d")[0]))

    lean = jax.checkpoint(loss, policy=normjax.norm_inputs_saveable)
    counts = [
        str(jax.make_jaxpr(jax.grad(f), axis_env=[("d", 2)])(x)).count("psum") for f in (loss, lean)
    ]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: LeakyReLU(0.0), "negative_slope=0.0, expected a finite number above 0"),
        (lambda: ELU(-1.0), "alpha=-1.0, expected a finite number above 0"),
        (
            lambda: batch_norm_act(
                np.ones((4, 3), np.float32), None, train=True, activation=nn.relu
            ),
            "has no inverse.*normjax.LeakyReLU",
        ),
        (
            lambda: normjax.linen.BatchNormAct(virtual_batch_size=2).init(
                jax.random.key(0), np.ones((4, 3), np.float32), train=True
            ),
            "virtual_batch_size=2, expected None",
        ),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call()


@pytest.mark.parametrize("activation", [LeakyReLU(0.1), ELU()])
@pytest.mark.parametrize("jacobian", [jax.jacrev, jax.jacfwd])
def test_its_jacobians_are_those_of_norm_and_activation(rng, activation, jacobian):
    """Many tangents beside one output."""
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)

    def one(x):
        return normjax.batch_norm_act(x, None, train=True, activation=activation)[0]

    def two(x):
        return activation(normjax.batch_norm(x, None, train=True)[0])

    np.testing.assert_allclose(jax.jit(jacobian(one))(x), jacobian(two)(x), atol=1e-5)
