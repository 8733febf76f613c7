"""Residual sums, filter response norm, dynamic tanh, local response norm, unit vectors."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from normjax import (
    add_layer_norm,
    add_rms_norm,
    dynamic_tanh,
    filter_response_norm,
    l2_normalize,
    layer_norm,
    local_response_norm,
    rms_norm,
)
from tests import reference
from tests.reference import EPS

KEY = jax.random.key(0)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize(
    ("fused", "plain"), [(add_layer_norm, layer_norm), (add_rms_norm, rms_norm)]
)
def test_the_norm_of_a_sum(rng, fused, plain):
    x, residual = rng.normal(size=(2, 3, 8)).astype(np.float32)
    scale = rng.normal(size=8).astype(np.float32)
    y, total = fused(x, residual, scale, epsilon=0.1)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(y, plain(x + residual, scale, epsilon=0.1))


def saves_the_sum_alone(fused, saved_arrays):
    x = jnp.ones((4, 16, 8), jnp.bfloat16)
    kept = saved_arrays(lambda x, r, s: fused(x, r, s), x, x, jnp.ones(8))
    return [(k.size, k.dtype) for k in kept if k.size >= x.size] == [(x.size, x.dtype)]


def test_add_layer_norm_guarantee_light_backward(saved_arrays):
    assert saves_the_sum_alone(add_layer_norm, saved_arrays)


def test_add_rms_norm_guarantee_light_backward(saved_arrays):
    assert saves_the_sum_alone(add_rms_norm, saved_arrays)


def test_a_residual_of_another_shape_or_dtype_is_an_error():
    x = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"residual has shape \(4,\), expected \(3, 4\)"):
        add_layer_norm(x, jnp.ones(4))
    with pytest.raises(TypeError, match=r"residual has dtype bfloat16, expected float32"):
        add_rms_norm(x, x.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_fused_modules_have_the_variables_of_the_plain_ones(rng, kind):
    x, residual = rng.normal(size=(2, 3, 8)).astype(np.float32)
    fused, plain = getattr(normjax.linen, f"Add{kind}")(), getattr(normjax.linen, kind)()
    variables = plain.init(KEY, x)
    (y, total), own = fused.init_with_output(KEY, x, residual)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    np.testing.assert_array_equal(y, plain.apply(variables, total))
    per_example = rng.normal(size=(3, 8)).astype(np.float32)
    (y, total), own = fused.init_with_output(KEY, x, residual, scale=per_example)
    assert "scale" not in own.get("params", {})
    np.testing.assert_allclose(y, plain.apply(variables, total) * per_example, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_filter_response_norm_equals_the_formula(rng, x64, masked):
    x, dy = rng.normal(1, 2, (2, 3, 4, 5, 6))
    scale, bias, threshold = rng.normal(size=(3, 6))
    mask = rng.random((3, 4, 5, 1)) < 0.7 if masked else None
    y, pullback = jax.vjp(
        lambda *a: filter_response_norm(*a, mask=mask, epsilon=0.1), x, scale, bias, threshold
    )
    options = dict(axes=(1, 2), mask=mask, epsilon=0.1, centered=False)
    before = reference.standardized(x, scale, bias, dy, **options).y
    passed = before > threshold
    want = reference.standardized(x, scale, bias, dy * passed, **options)
    np.testing.assert_allclose(y, np.maximum(before, threshold), rtol=1e-9)
    expected = (want.dx, want.dscale, want.dbias, (dy * ~passed).sum((0, 1, 2)))
    for got, expect in zip(pullback(dy), expected, strict=True):
        np.testing.assert_allclose(got, expect, rtol=1e-9, atol=1e-9)


def test_filter_response_norm_guarantee_masked_out_means_out(rng):
    x = rng.normal(size=(2, 6, 3)).astype(np.float32)
    mask = rng.random((2, 6, 1)) < 0.7
    padded = np.where(mask, x, np.float32(np.nan))
    f = partial(filter_response_norm, threshold=jnp.full(3, -0.5), mask=mask)
    y, pullback = jax.vjp(f, padded)
    want, pullback_zero = jax.vjp(f, np.where(mask, x, np.float32(0)))
    np.testing.assert_array_equal(y, want)
    here = np.broadcast_to(mask, x.shape)
    g, g0 = (np.asarray(p(jnp.ones_like(y))[0]) for p in (pullback, pullback_zero))
    np.testing.assert_array_equal(g[here], g0[here])
    assert np.isfinite(g).all()


def test_filter_response_norm_edge_one_position():
    y = filter_response_norm(jnp.array([[[4.0, -4.0]]]), threshold=jnp.array([0.0, -0.5]))
    np.testing.assert_allclose(y, [[[1, -0.5]]], rtol=1e-6)


def test_filter_response_module_has_three_parameters(rng):
    x = rng.normal(size=(2, 6, 3)).astype(np.float32)
    y, variables = normjax.linen.FilterResponseNorm().init_with_output(KEY, x)
    params = variables["params"]
    np.testing.assert_array_equal(y, filter_response_norm(x, **params))


def test_dynamic_tanh_equals_the_formula(rng, x64):
    x, dy = rng.normal(size=(2, 3, 4))
    scale, bias = rng.normal(size=(2, 4))
    y, pullback = jax.vjp(dynamic_tanh, x, 0.7, scale, bias)
    t = np.tanh(0.7 * x)
    np.testing.assert_allclose(y, t * scale + bias, rtol=1e-12)
    inner = dy * scale * (1 - t**2)
    expected = (inner * 0.7, (inner * x).sum(), (dy * t).sum(0), dy.sum(0))
    for got, want in zip(pullback(dy), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_dynamic_tanh_guarantee_no_statistics(rng):
    x = rng.normal(size=(6, 4)).astype(np.float32)
    np.testing.assert_array_equal(dynamic_tanh(x)[2:3], dynamic_tanh(x[2:3]))
    assert dynamic_tanh(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"alpha has shape \(4,\), expected \(\)"):
        dynamic_tanh(x, np.ones(4, np.float32))


def test_dynamic_tanh_module(rng):
    x = rng.normal(size=(6, 4)).astype(np.float32)
    y, variables = normjax.linen.DynamicTanh().init_with_output(KEY, x)
    assert {k: v.shape for k, v in variables["params"].items()} == {
        "alpha": (),
        "scale": (4,),
        "bias": (4,),
    }
    np.testing.assert_allclose(y, np.tanh(0.5 * x), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("axis", [1, -1])
def test_local_response_norm_equals_the_formula_and_pytorch(rng, x64, torch, size, axis):
    x, dy = rng.normal(size=(2, 2, 7, 3, 7))
    options = dict(size=size, alpha=0.3, beta=0.6, k=1.5)
    y, pullback = jax.vjp(partial(local_response_norm, feature_axis=axis, **options), x)
    tx = torch.tensor(np.moveaxis(x, axis, 1).copy(), requires_grad=True)
    ty = torch.nn.functional.local_response_norm(tx, size, 0.3, 0.6, 1.5)
    ty.backward(torch.tensor(np.moveaxis(dy, axis, 1).copy()))
    np.testing.assert_allclose(y, np.moveaxis(ty.detach().numpy(), 1, axis), rtol=1e-9)
    want = np.moveaxis(tx.grad.numpy(), 1, axis)
    np.testing.assert_allclose(pullback(dy)[0], want, rtol=1e-9, atol=1e-12)


def test_local_response_norm_by_hand():
    x = jnp.array([1.0, 2.0, 3.0])
    got = local_response_norm(x, size=3, alpha=3.0, beta=1.0, k=1.0)
    np.testing.assert_allclose(got, [1 / 6, 2 / 15, 3 / 14], rtol=1e-6)


def test_local_response_norm_guarantee_float32_inside(rng):
    x = jnp.asarray(rng.normal(300, 1, (4, 8)), jnp.float16)  # squares beyond float16
    got = local_response_norm(x, alpha=1.0)
    want = local_response_norm(np.asarray(x, np.float32), alpha=1.0)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=EPS["float16"])


def test_local_response_norm_error_messages():
    with pytest.raises(ValueError, match="size=0, expected a whole number"):
        local_response_norm(jnp.ones(3), size=0)
    with pytest.raises(ValueError, match="k=0.0, expected a number above 0"):
        local_response_norm(jnp.ones(3), k=0.0)


def test_l2_normalize_equals_the_formula(rng, x64):
    x, dy = rng.normal(size=(2, 3, 4))
    y, pullback = jax.vjp(partial(l2_normalize, epsilon=0.0), x)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / length
    np.testing.assert_allclose(y, unit, rtol=1e-12)
    want = (dy - unit * (dy * unit).sum(-1, keepdims=True)) / length
    np.testing.assert_allclose(pullback(dy)[0], want, rtol=1e-9)


def test_l2_normalize_guarantee_float32_inside(rng):
    x = jnp.asarray(rng.normal(300, 1, (4, 512)), jnp.float16)
    got = np.asarray(l2_normalize(x), np.float64)
    exact = np.asarray(x, np.float64)
    want = exact / np.linalg.norm(exact, axis=-1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=EPS["float16"])


def test_l2_normalize_edge_zeros():
    y, pullback = jax.vjp(l2_normalize, jnp.zeros((2, 3)))
    np.testing.assert_array_equal(y, np.zeros((2, 3)))
    assert np.isfinite(pullback(jnp.ones((2, 3)))[0]).all()


def test_an_initializer_may_add_one_to_gamma(rng):
    """scale = 1 + gamma: the initializer draws gamma around zero and adds 1."""
    x = rng.normal(size=(3, 8)).astype(np.float32)

    def one_plus(key, shape, dtype):
        return 1 + nn.initializers.normal(0.1)(key, shape, dtype)

    layer = normjax.linen.RMSNorm(scale_init=one_plus)
    scale = layer.init(KEY, x)["params"]["scale"]
    assert abs(float(scale.mean()) - 1) < 0.2


def large_saved_dtypes(saved_arrays, rng, function, vectors):
    """The dtypes of saved arrays that are at least as large as x."""
    x = jnp.asarray(rng.normal(size=(6, 4, 3)), jnp.bfloat16)
    kept = saved_arrays(function, x, *(jnp.asarray(v, jnp.float32) for v in vectors))
    return [k.dtype for k in kept if k.size >= x.size]


def test_dynamic_tanh_guarantee_light_backward(rng, saved_arrays):
    vectors = 0.5, *rng.normal(size=(2, 3))
    assert large_saved_dtypes(saved_arrays, rng, dynamic_tanh, vectors) == ["bfloat16"]


def test_filter_response_norm_guarantee_light_backward(rng, saved_arrays):
    vectors = rng.normal(size=(3, 3))
    assert large_saved_dtypes(saved_arrays, rng, filter_response_norm, vectors) == ["bfloat16"]


def lrn(x, alpha=0.5, beta=0.75, k=1.0):
    return local_response_norm(x, size=3, alpha=alpha, beta=beta, k=k)


def test_local_response_norm_guarantee_light_backward(rng, saved_arrays):
    assert large_saved_dtypes(saved_arrays, rng, lrn, (0.5, 0.75)) == ["bfloat16"]


def numpy_tanh(x, alpha, scale, bias):
    return np.tanh(x * alpha) * scale + bias


def numpy_frn(x, scale, bias, floor):
    y = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) * scale + bias
    return np.where(y.real > floor.real, y, floor + 0 * y)


def numpy_lrn(x, alpha, beta, k):
    squares = np.pad(x * x, [(0, 0), (0, 0), (1, 1)])
    total = squares[..., :-2] + squares[..., 1:-1] + squares[..., 2:]
    return x * (k + alpha / 3 * total) ** -beta


RECOMPUTED = {
    "dynamic_tanh": (dynamic_tanh, numpy_tanh, [(), (3,), (3,)]),
    "filter_response_norm": (filter_response_norm, numpy_frn, [(3,), (3,), (3,)]),
    "local_response_norm": (lrn, numpy_lrn, [(), (), ()]),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_derivatives_equal_the_formula(name, rng, x64):
    """By all arguments: forward mode, reverse mode, and second derivatives by differences."""
    function, formula, shapes = RECOMPUTED[name]
    args = rng.normal(size=(2, 4, 3)), *(1 + 0.5 * rng.random(shape) for shape in shapes)
    moves = tuple(rng.normal(size=np.shape(a)) for a in args)
    dy, h = rng.normal(size=(2, 4, 3)), 1e-30

    def along(i, args=args):
        moved = [
            a + 1j * h * m * (i in (j, None))
            for j, (a, m) in enumerate(zip(args, moves, strict=True))
        ]
        return np.imag(formula(*moved)) / h

    np.testing.assert_allclose(function(*args), formula(*args), rtol=1e-12, atol=1e-12)

    def push(args):
        return jax.jvp(function, args, moves)[1]

    np.testing.assert_allclose(jax.jit(push)(args), along(None), rtol=1e-10, atol=1e-12)
    pull = jax.jit(jax.grad(lambda args: jnp.vdot(dy, function(*args))))
    for i, (gradient, move) in enumerate(zip(pull(args), moves, strict=True)):
        assert np.vdot(gradient, move) == pytest.approx(np.vdot(dy, along(i)), rel=1e-10)
    second, twice = (
        jax.jit(lambda args, f=f: jax.jvp(f, (args,), (moves,))[1])(args) for f in (push, pull)
    )
    step = 1e-6
    ahead, back = (
        along(None, [a + s * m for a, m in zip(args, moves, strict=True)]) for s in (step, -step)
    )
    want = (ahead - back) / (2 * step)
    np.testing.assert_allclose(second, want, rtol=1e-5, atol=1e-6 * np.max(abs(want)))
    total = sum(np.vdot(t, m) for t, m in zip(twice, moves, strict=True))
    assert total == pytest.approx(np.vdot(dy, want), rel=1e-5)


def test_filter_response_norm_edge_y_at_the_threshold(torch):
    """A tie of the maximum, which is common for zeros: x = 0, bias = 0, threshold = 0."""
    x, zero = jnp.zeros((1, 2, 1)), jnp.zeros(1)
    options = dict(epsilon=1.0)
    dx, d_floor = jax.grad(
        lambda x, t: jnp.sum(filter_response_norm(x, None, None, t, **options)), (0, 1)
    )(x, zero)
    y, floor = (torch.zeros(2, requires_grad=True) for _ in range(2))
    torch.maximum(y, floor).sum().backward()
    np.testing.assert_array_equal(dx.ravel(), y.grad)
    np.testing.assert_array_equal(d_floor, [floor.grad.sum()])


def test_integers_of_numpy_are_accepted(rng):
    x = jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32)
    stats = normjax.SpectralStats(jnp.ones((1, 6)), jnp.ones(()))
    for call in (
        lambda n: local_response_norm(x, size=n),
        lambda n: normjax.group_norm(x, num_groups=n),
        lambda n: normjax.group_norm(x, group_size=n),
        lambda n: normjax.spectral_norm(x, stats, train=True, n_steps=n)[0],
        lambda n: normjax.batch_norm(x, None, train=True, virtual_batch_size=n)[0],
    ):
        np.testing.assert_array_equal(call(np.int64(2)), call(2))


@pytest.mark.parametrize(
    "function",
    [
        l2_normalize,
        normjax.weight_norm,
        normjax.standardize_weight,
        partial(local_response_norm, size=1, alpha=0.5, beta=0.5, k=0.01),
    ],
)
def test_a_gradient_of_half_precision_is_rounded_once(rng, function):
    """It is a sum of two parts. If each were rounded, the error would exceed the bound."""
    x, dy = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.bfloat16)
    (got,) = jax.vjp(function, x)[1](dy)
    (want,) = jax.vjp(function, x.astype(np.float32))[1](dy.astype(np.float32))
    bound = EPS["bfloat16"] / 2 * abs(want) + 16 * EPS["float32"] * abs(want).max()
    assert np.all(abs(np.asarray(got, np.float32) - want) <= bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_a_threshold_is_summed_in_its_own_dtype(dtype):
    """In half precision a sum of 70,000 ones is 70,144 or infinite."""
    x = jnp.zeros((1, 70_000, 1), dtype)
    y, pullback = jax.vjp(lambda t: filter_response_norm(x, threshold=t), jnp.ones(1))
    np.testing.assert_array_equal(pullback(jnp.ones_like(y))[0], [70_000])


def test_the_gradient_of_a_half_precision_threshold_is_rounded_once(rng):
    x, dy = jnp.zeros((8, 6, 4, 3), jnp.bfloat16), rng.normal(size=(8, 6, 4, 3))
    dy, threshold = jnp.asarray(dy, x.dtype), jnp.ones(3, x.dtype)
    _, pullback = jax.vjp(lambda t: filter_response_norm(x, threshold=t), threshold)
    want = np.asarray(dy, np.float64).sum((0, 1, 2))
    got = np.asarray(pullback(dy)[0], np.float64)
    # Terms up to 4 in a float32 sum of 192, and one rounding.
    bound = EPS["bfloat16"] / 2 * abs(want) + 192 * 4 * EPS["float32"]
    assert np.all(abs(got - want) <= bound)
