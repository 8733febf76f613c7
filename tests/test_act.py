"""batch_norm_act, which keeps only x for the backward pass, and the policy norm_inputs_saveable."""

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
from tests import reference
from tests.compiling import DEFAULT
from tests.reference import EPS

ACTIVATIONS = {
    LeakyReLU(): nn.leaky_relu,
    LeakyReLU(2.0): partial(nn.leaky_relu, negative_slope=2.0),
    ELU(): nn.elu,
    ELU(0.5): partial(nn.elu, alpha=0.5),
}
ONES = np.ones((4, 3), np.float32)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture
def data(rng):
    x = jnp.asarray(rng.normal(1, 2, (8, 5, 3)), jnp.float32)
    return x, jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, -1.0])


def joined(activation, **options):
    """A loss of `batch_norm_act` that is not linear in z, with the new statistics."""

    def loss(x, scale, bias):
        stats = BatchStats.make(3)
        z, stats = batch_norm_act(
            x, stats, scale, bias, train=True, activation=activation, **options
        )
        return jnp.sum(jnp.sin(z)), stats

    return loss


def plain(activation, **options):
    """The same from batch norm and the activation of Flax."""

    def loss(x, scale, bias):
        y, stats = batch_norm(x, BatchStats.make(3), scale, bias, train=True, **options)
        return jnp.sum(jnp.sin(ACTIVATIONS[activation](y))), stats

    return loss


@every_activation
def test_batch_norm_act_guarantee_same_result(activation, data, x64):
    """Value, statistics, first derivatives by both modes and second ones, in float64."""
    data = [np.asarray(v, np.float64) for v in data]
    mask = np.arange(8).reshape(8, 1, 1) < 6

    def first(loss, data):
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*data)

    def pushed(loss, data):
        return jax.jvp(lambda *v: loss(*v)[0], data, data)

    def second(loss, data):
        inner = jax.grad(lambda *v: loss(*v)[0])
        return jax.grad(lambda *v: jnp.sum(inner(*v) ** 2), (0, 1, 2))(*data)

    @jax.jit
    def derivatives(data):
        """Derivatives of `joined` and of `plain`, with and without a mask."""
        return [
            [
                derivative(f(activation, **options), data)
                for options in ({}, {"mask": mask})
                for derivative in (first, pushed, second)
            ]
            for f in (joined, plain)
        ]

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9), *derivatives(data))


# Slope of each activation in NumPy, at 0 as in JAX.
SLOPES = {
    LeakyReLU(): lambda y: np.where(y >= 0, 1, 0.01),
    ELU(): lambda y: np.where(y > 0, 1, np.exp(np.minimum(y, 0))),
    jax.nn.softplus: lambda y: 1 / (1 + np.exp(-y)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", SLOPES)
def test_batch_norm_act_guarantee_same_result_where_the_output_says_little(activation, dtype, rng):
    """Saturated outputs, scales far below the bias, a scale of 0: z does not determine x there."""
    x, dz = (jnp.asarray(rng.normal(size=(64, 6)), dtype) for _ in range(2))
    scale = jnp.array([5.0, 10.0, 3.0, 0.01, 1e-3, 0.0])
    bias = jnp.array([0.0, 0.0, -4.0, -3.0, 1.0, 1.0])

    def call(x, scale, bias):
        return batch_norm_act(x, None, scale, bias, train=True, activation=activation)[0]

    _, pullback = jax.vjp(call, x, scale, bias)
    dx, dscale, dbias = (np.asarray(v, np.float64) for v in pullback(dz))

    y = reference.batch_norm(x, scale, bias, axes=(0,)).y
    dy = np.asarray(dz, np.float64) * SLOPES[activation](y)
    exact = reference.batch_norm(x, scale, bias, dy, axes=(0,))
    xhat = reference.batch_norm(x, axes=(0,)).y
    # The slope has the error of y, which is eps times |scale| + |bias|; dy is rounded once.
    unit = 8 * EPS[dtype] + 8 * EPS["float32"] * np.max(abs(y), 0)
    largest = np.max(abs(dy), 0) * np.asarray(scale) / np.sqrt(exact.var + 1e-5)
    assert np.all(abs(dx - exact.dx) <= unit * largest)
    assert np.all(abs(dscale - exact.dscale) <= unit * np.sum(abs(dy * xhat), 0))
    assert np.all(abs(dbias - exact.dbias) <= unit * np.sum(abs(dy), 0))


def test_a_masked_entry_whose_output_overflows_leaves_other_gradients_finite(rng):
    for dtype, large in (("float16", 6e4), ("float32", 3e38)):
        x = jnp.asarray(rng.normal(0, 0.1, (8, 2)), dtype).at[0].set(large)
        mask = np.arange(8).reshape(8, 1) > 0
        for activation in (LeakyReLU(), ELU()):

            def loss(x, scale, activation=activation, mask=mask):
                z, _ = batch_norm_act(x, None, scale, train=True, activation=activation, mask=mask)
                return jnp.sum(jnp.where(mask, z, jnp.zeros((), z.dtype)).astype(jnp.float32) ** 3)

            dx, dscale = jax.jit(jax.grad(loss, (0, 1)))(x, jnp.ones(2))
            assert np.isfinite(dx).all()
            assert np.isfinite(dscale).all()
            unmasked = jax.jit(jax.grad(partial(loss, mask=mask[1:])))(x[1:], jnp.ones(2))
            np.testing.assert_allclose(dx[1:], unmasked, rtol=8 * EPS[dtype], atol=64 * EPS[dtype])


@pytest.mark.parametrize("activation", [LeakyReLU(), ELU(), ELU(2.0)])
def test_derivatives_of_activations_at_zero_are_those_of_jax(activation):
    zero = jnp.zeros(())
    twin = jax.nn.leaky_relu
    if isinstance(activation, ELU):
        twin = partial(jax.nn.elu, alpha=activation.alpha)
    for derivative in (jax.grad, lambda f: jax.grad(jax.grad(f)), jax.jacfwd):
        assert derivative(activation)(zero) == derivative(twin)(zero)


@every_activation
def test_activations_are_those_of_flax(activation):
    y = np.linspace(-5, 5, 101, dtype=np.float32)
    z = activation(jnp.asarray(y))
    np.testing.assert_allclose(z, ACTIVATIONS[activation](y), rtol=4 * EPS["float32"])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("activation", [LeakyReLU(), ELU(), nn.gelu, nn.relu])
def test_batch_norm_act_guarantee_light_backward(train, activation, data, saved_arrays):
    x, scale, bias = data
    mask = np.arange(8).reshape(8, 1, 1) < 6

    for dtype in (jnp.float32, jnp.bfloat16):
        for options in ({}, {"mask": mask}):

            def call(x, scale, bias, options=options):
                stats = BatchStats.make(3)
                how = dict(train=train, activation=activation, **options)
                return batch_norm_act(x, stats, scale, bias, **how)[0]

            own = x.astype(dtype)
            large = [k for k in saved_arrays(call, own, scale, bias) if k.size >= x.size]
            assert [(k.size, k.dtype) for k in large] == [(x.size, dtype)]


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_sharing_over_devices_equals_the_whole_batch(how, data):
    x, scale, bias = data
    whole = jax.grad(lambda *v: joined(ELU())(*v)[0], (0, 1, 2))(x, scale, bias)
    shared = joined(ELU(), axis_name="d")

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

    program = jax.jit(jax.value_and_grad(loss), compiler_options=DEFAULT)
    compiled = program.lower(variables["params"]).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled(variables["params"])


def test_norm_inputs_saveable_guarantee_same_result(rng):
    """Also, with either tool a scanned stack needs less memory than with Flax's norm."""
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


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="its XLA fuses differently")
def test_an_unrolled_stack_needs_less_memory_with_the_policy():
    """Each block keeps one array: not x and also a rounded copy of it."""
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
        (lambda: batch_norm_act(ONES, None, train=True, activation="relu"), "expected a hashable"),
        (
            lambda: batch_norm_act(ONES, None, train=True, activation=nn.softmax),
            "normjax.batch_norm_act: activation=.*fails for a single number",
        ),
        (
            lambda: batch_norm_act(ONES, None, train=True, activation=lambda y: (y, y)),
            r"returns \(shape, dtype\) .* for a float32 number, expected a float32 number",
        ),
        (
            lambda: batch_norm_act(ONES.astype(np.complex64), None, train=True),
            "normjax.batch_norm_act: x has dtype complex64, expected a real dtype",
        ),
    ],
)
def test_errors_name_the_bad_argument(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call()


@pytest.mark.parametrize("activation", [LeakyReLU(0.1), ELU()])
@pytest.mark.parametrize("jacobian", [jax.jacrev, jax.jacfwd])
def test_jacobians_equal_those_of_norm_and_activation(rng, activation, jacobian):
    """Many tangents for one output."""
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)

    def one(x):
        return normjax.batch_norm_act(x, None, train=True, activation=activation)[0]

    def two(x):
        return activation(normjax.batch_norm(x, None, train=True)[0])

    np.testing.assert_allclose(jax.jit(jacobian(one))(x), jacobian(two)(x), atol=1e-5)


def test_virtual_batches_are_those_of_batch_norm(rng):
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    model = normjax.linen.BatchNormAct(virtual_batch_size=2, activation=nn.gelu)
    variables = model.init(jax.random.key(0), x, train=False)
    z, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    y, stats = batch_norm(x, BatchStats.make(3), train=True, virtual_batch_size=2)
    np.testing.assert_allclose(z, nn.gelu(y), atol=4 * EPS["float32"])
    np.testing.assert_array_equal(updates["batch_stats"]["var"], stats.var)
