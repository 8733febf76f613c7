"""Norms of a weight: weight norm, spectral norm, standardized weights, and their modules."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import from_bytes, to_bytes

import normjax.linen
from normjax import SpectralStats, spectral_norm, standardize_weight, weight_norm
from tests import reference
from tests.reference import EPS

KEY = jax.random.key(0)
SHAPES = {"dense": (7, 4), "conv": (3, 3, 2, 5), "one row": (1, 4), "one feature": (6, 1)}


def vjp(function, *args, dy):
    @jax.jit
    def both(args, dy):
        y, pullback = jax.vjp(function, *args)
        return (y, *pullback(dy))

    return both(args, dy)


def reduced(w):
    return tuple(range(w.ndim - 1))


@pytest.mark.parametrize("name", SHAPES)
def test_weight_norm_equals_the_formula_and_pytorch(rng, x64, name):
    w, dy = rng.normal(size=(2, *SHAPES[name]))
    scale = rng.normal(size=w.shape[-1])
    y, dw, dscale = vjp(partial(weight_norm, epsilon=0.0), w, scale, dy=dy)
    length = np.sqrt((w**2).sum(reduced(w)))
    direction = w / length
    dd = dy * scale
    np.testing.assert_allclose(y, direction * scale, rtol=1e-10)
    along = (dd * direction).sum(reduced(w))
    np.testing.assert_allclose(dw, (dd - direction * along) / length, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dscale, (dy * direction).sum(reduced(w)), rtol=1e-9, atol=1e-12)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    want = torch._weight_norm(torch.tensor(w), torch.tensor(scale), w.ndim - 1)
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-9)


def test_weight_norm_over_all_axes(rng):
    w = rng.normal(size=(3, 4)).astype(np.float32)
    got = weight_norm(w, np.float32(2), feature_axis=None)
    np.testing.assert_allclose(got, 2 * w / np.linalg.norm(w), rtol=1e-5)


@pytest.mark.parametrize("function", [weight_norm, standardize_weight])
def test_float32_inside(rng, function):
    w = jnp.asarray(rng.normal(1, 1, (512, 4)), jnp.bfloat16)
    want = function(np.asarray(w, np.float32))
    got = np.asarray(function(w), np.float32)
    np.testing.assert_allclose(got, want, rtol=EPS["bfloat16"] / 2)
    assert function(w).dtype == jnp.bfloat16


def test_weight_norm_guarantee_float32_inside(rng):
    test_float32_inside(rng, weight_norm)


def test_standardize_weight_guarantee_float32_inside(rng):
    test_float32_inside(rng, standardize_weight)


def test_weight_norm_edge_zeros():
    y, dw = vjp(weight_norm, jnp.zeros((3, 2)), dy=jnp.ones((3, 2)))
    np.testing.assert_array_equal(y, np.zeros((3, 2)))
    assert np.isfinite(dw).all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_standardize_weight_equals_the_oracle(rng, x64, name, scaled):
    w, dy = rng.normal(1, 2, (2, *SHAPES[name]))
    gain = rng.normal(size=w.shape[-1])
    n = w.size // w.shape[-1]
    function = partial(standardize_weight, scaled=scaled, epsilon=0.01)
    y, dw, dgain = vjp(function, w, gain, dy=dy)
    # sqrt(n var + e) = sqrt(n) sqrt(var + e / n)
    factor, epsilon = (n**0.5, 0.01 / n) if scaled else (1, 0.01)
    want = reference.batch_norm(w, gain / factor, 0, dy, axes=reduced(w), epsilon=epsilon)
    np.testing.assert_allclose(y, want.y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dw, want.dx, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dgain, want.dscale / factor, rtol=1e-9, atol=1e-9)


def test_standardize_weight_edge_one_weight_for_each_feature():
    np.testing.assert_array_equal(standardize_weight(jnp.full((1, 3), 7.0)), np.zeros((1, 3)))


@pytest.mark.parametrize("name", SHAPES)
def test_spectral_norm_guarantee_converges(rng, name):
    w = rng.normal(size=SHAPES[name]).astype(np.float32)
    stats = SpectralStats(jnp.asarray(rng.normal(size=(1, w.shape[-1])), jnp.float32), jnp.ones(()))
    step = jax.jit(partial(spectral_norm, train=True, n_steps=20))
    for _ in range(20):
        normed, stats = step(w, stats)
    matrix = w.reshape(-1, w.shape[-1]).astype(np.float64)
    largest = np.linalg.svd(matrix, compute_uv=False)[0]
    assert float(stats.sigma) == pytest.approx(largest, rel=1e-4)
    np.testing.assert_allclose(normed, w / largest, rtol=2e-4, atol=1e-5)


def test_spectral_norm_guarantee_no_gradient(rng, x64):
    """d sigma / dW = v^T u, the derivative of the largest singular value, not of the iteration."""
    w, dy = rng.normal(size=(2, 5, 4))
    u, s, vt = np.linalg.svd(w)
    stats = SpectralStats(jnp.asarray(vt[:1]), jnp.ones(()))
    normed, dw = vjp(lambda w: spectral_norm(w, stats, train=False)[0], w, dy=dy)
    outer = np.outer(u[:, 0], vt[0])
    np.testing.assert_allclose(normed, w / s[0], rtol=1e-9)
    want = dy / s[0] - (dy * w).sum() / s[0] ** 2 * outer
    np.testing.assert_allclose(dw, want, rtol=1e-9, atol=1e-9)
    start = jax.grad(lambda u: spectral_norm(w, SpectralStats(u, s[0]), train=True)[0].sum())
    np.testing.assert_array_equal(start(stats.u), np.zeros((1, 4)))


def test_spectral_norm_edge_zeros():
    stats = SpectralStats(jnp.ones((1, 3)), jnp.ones(()))
    normed, new = spectral_norm(jnp.zeros((2, 3)), stats, train=True)
    for leaf in (normed, *new):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_spectral_norm_edge_u_0(rng):
    """A zero u stays zero. Its first step is not normalized to length 1."""
    w = (rng.normal(size=(2, 3)) * 1e-3).astype(np.float32)
    stats = SpectralStats(jnp.zeros((1, 3)), jnp.zeros(()))
    normed, new = spectral_norm(w, stats, train=True, n_steps=3)
    np.testing.assert_array_equal(normed, w)
    jax.tree.map(np.testing.assert_array_equal, new, stats)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_does_not_change_u(bad):
    stats = SpectralStats(jnp.ones((1, 3)), jnp.ones(()))
    _, new = spectral_norm(jnp.full((2, 3), bad, jnp.float32), stats, train=True)
    np.testing.assert_array_equal(new.u, stats.u)


@pytest.mark.parametrize("size", [1e-20, 1e-7, 1e7])
def test_spectral_norm_is_right_for_any_unit_of_the_weight(rng, size):
    w = (rng.normal(size=(6, 4)) * size).astype(np.float32)
    stats = SpectralStats(jnp.ones((1, 4)), jnp.ones(()))
    normed, stats = spectral_norm(w, stats, train=True, n_steps=200)
    largest = np.linalg.svd(w.astype(np.float64), compute_uv=False)[0]
    assert float(stats.sigma) == pytest.approx(largest, rel=1e-4)
    np.testing.assert_allclose(normed, w / largest, rtol=1e-3, atol=1e-5)


def test_spectral_norm_keeps_the_dtypes_of_its_state(rng):
    w = jnp.asarray(rng.normal(size=(6, 4)), jnp.bfloat16)
    stats = SpectralStats(jnp.ones((1, 4), jnp.bfloat16), jnp.ones((), jnp.bfloat16))
    normed, new = spectral_norm(w, stats, train=True)
    assert {leaf.dtype for leaf in (normed, *new)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(TypeError, match="w has dtype complex64"):
        spectral_norm(w.astype(jnp.complex64), stats, train=True)


def test_a_weight_with_only_a_feature_axis(rng):
    w = rng.normal(size=4).astype(np.float32)
    np.testing.assert_allclose(weight_norm(w), np.sign(w), rtol=1e-5)
    np.testing.assert_array_equal(standardize_weight(w), np.zeros(4))


def test_spectral_norm_updates_only_in_training(rng):
    w = rng.normal(size=(5, 4)).astype(np.float32)
    stats = SpectralStats(jnp.ones((1, 4)), jnp.ones(()))
    kept, same = spectral_norm(w, stats, train=False)
    assert same is stats
    moved, new = spectral_norm(w, stats, train=True)
    np.testing.assert_array_equal(kept, moved)
    assert not np.allclose(new.u, stats.u)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: spectral_norm(jnp.ones(4), s, train=True),
            r"\(4,\).*rank of at least 2",
        ),
        (
            lambda s: spectral_norm(jnp.ones((2, 3)), s, train=True),
            r"stats.u has shape",
        ),
        (
            lambda s: spectral_norm(jnp.ones((2, 4)), s, train=True, n_steps=0),
            r"n_steps=0",
        ),
        (
            lambda s: weight_norm(jnp.ones((2, 4)), jnp.ones(2)),
            r"\(2,\), expected \(4,\)",
        ),
        (lambda s: standardize_weight(jnp.ones((2, 4)), jnp.ones(2)), r"gain has shape \(2,\)"),
        (lambda s: weight_norm(jnp.ones((0, 4))), r"has no element over the axes \(0,\)"),
    ],
)
def test_invalid_input_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(SpectralStats(jnp.ones((1, 4)), jnp.ones(())))


class Net(nn.Module):
    """Two wrapped layers."""

    package: object
    kind: str
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        wrap = getattr(self.package, self.kind)
        mode = {"update_stats": True} if self.kind == "SpectralNorm" else {}
        x = nn.relu(wrap(nn.Conv(4, (3, 3)), **dict(self.options))(x, **mode))
        return wrap(nn.Dense(3), **dict(self.options))(x, **mode)


class Switched(nn.Module):
    """A layer with a mode of its own."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x) * (2 if train else 1)


def test_the_wrapped_layer_may_have_a_mode_of_its_own(rng):
    x = rng.normal(size=(2, 4)).astype(np.float32)
    for train in (True, False):
        results = []
        for package in (nn, normjax.linen):
            layer = package.SpectralNorm(Switched())
            y, _ = layer.init_with_output(KEY, x, update_stats=True, train=train)
            results.append(y)
        np.testing.assert_allclose(results[1], results[0], atol=1e-5)


CASES = [
    ("WeightNorm", (("variable_filter", None),)),
    ("WeightNorm", ()),
    ("WeightNorm", (("use_scale", False),)),
    ("WeightNorm", (("feature_axes", None), ("variable_filter", ("kernel",)))),
    ("SpectralNorm", ()),
    ("SpectralNorm", (("n_steps", 3),)),
]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_modules_are_drop_ins(rng, kind, options):
    x = rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
    results = []
    for package in (nn, normjax.linen):
        model = Net(package, kind, options)
        init = jax.jit(model.init)
        variables = init(KEY, x)

        @jax.jit
        def step(variables, x, model=model):
            def loss(params):
                own = {**variables, "params": params}
                y, updates = model.apply(own, x, mutable=["batch_stats"])
                return jnp.sum(y**2), (y, updates)

            grads, aux = jax.grad(loss, has_aux=True)(variables["params"])
            return *aux, grads

        results.append((init, step, variables, step(variables, x)))
    (flax, by_flax, flax_variables, want), (ours, by_us, our_variables, got) = results
    assert jax.tree.structure(our_variables) == jax.tree.structure(flax_variables)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), our_variables, flax_variables)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)
    for variables, init, reader, same in (
        (flax_variables, ours, by_us, want[0]),
        (our_variables, flax, by_flax, got[0]),
    ):
        loaded = from_bytes(init(jax.random.key(1), x), to_bytes(variables))
        np.testing.assert_allclose(reader(loaded, x)[0], same, atol=1e-5)


@pytest.mark.parametrize("kind", ["WeightNorm", "SpectralNorm"])
def test_fields_are_those_of_flax_in_their_order(kind):
    names = [[f.name for f in dataclasses.fields(getattr(h, kind))] for h in (nn, normjax.linen)]
    assert names[0] == names[1]


@pytest.mark.usefixtures("lenient")
def test_spectral_norm_module_error_messages(rng):
    x = rng.normal(size=(2, 4)).astype(np.float32)
    layer = normjax.linen.SpectralNorm(nn.Dense(3))
    variables = layer.init(KEY, x, train=False)
    layer.apply(variables, x, train=False)
    with pytest.raises(ValueError, match="neither train nor update_stats was given"):
        layer.apply(variables, x)
    conv = normjax.linen.SpectralNorm(nn.Conv(3, (2,)), error_on_non_matrix=True)
    with pytest.raises(ValueError, match="Input is 3D but error_on_non_matrix is True"):
        conv.init(KEY, x[None], train=False)


@pytest.mark.usefixtures("lenient")
def test_weight_standardized_leaves_the_parameters(rng):
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    conv = nn.Conv(4, (3, 3))
    plain = conv.init(KEY, x)["params"]
    layer = normjax.linen.WeightStandardized(nn.Conv(4, (3, 3)), use_gain=True)
    variables = layer.init(KEY, x)
    inner = variables["params"]["layer_instance"]
    assert jax.tree.map(jnp.shape, inner) == jax.tree.map(jnp.shape, plain)
    standardized = {"kernel": standardize_weight(inner["kernel"]), "bias": inner["bias"]}
    want = conv.apply({"params": standardized}, x)
    np.testing.assert_allclose(layer.apply(variables, x), want, atol=1e-5)
    assert variables["params"]["layer_instance/kernel/gain"].shape == (4,)


@pytest.mark.usefixtures("lenient")
def test_scaled_standardization_keeps_the_variance_of_the_output(rng):
    x = rng.normal(size=(4096, 64)).astype(np.float32)
    layer = normjax.linen.WeightStandardized(nn.Dense(16, use_bias=False), scaled=True)
    y, _ = layer.init_with_output(KEY, x)
    # The variance of 4096 samples of variance 1 has the deviation sqrt(2 / 4096) = 0.022.
    np.testing.assert_allclose(np.var(y, axis=0), np.ones(16), atol=6 * 0.022)


def test_equals_haiku(rng):
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")
    w = rng.normal(size=(6, 4)).astype(np.float32)
    net = hk.transform_with_state(lambda w: hk.SpectralNorm(n_steps=30)(w))
    params, state = net.init(KEY, w)
    theirs, _ = net.apply(params, state, None, w)
    stats = SpectralStats(jnp.ones((1, 4)), jnp.ones(()))
    ours, _ = spectral_norm(w, stats, train=True, n_steps=60)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
