"""Normalization by given moments, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import normalize
from tests import reference
from tests.reference import EPS


def expected(x, mean, var, scale=1.0, bias=0.0, epsilon=1e-5):
    x, mean, var, scale, bias = (np.asarray(v, np.float64) for v in (x, mean, var, scale, bias))
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_normalize_equals_the_formula(rng, with_scale, with_bias):
    x = rng.normal(2, 3, (5, 4)).astype(np.float32)
    mean, var, scale, bias = (rng.random(4).astype(np.float32) + 0.5 for _ in range(4))
    scale, bias = scale if with_scale else None, bias if with_bias else None
    got = normalize(x, mean, var, scale, bias, epsilon=0.1)
    want = expected(x, mean, var, 1 if scale is None else scale, 0 if bias is None else bias, 0.1)
    np.testing.assert_allclose(got, want, atol=16 * EPS["float32"])


def test_a_scale_for_each_example_broadcasts(rng):
    x = rng.normal(size=(3, 5, 4)).astype(np.float32)
    scale, bias = rng.random((2, 3, 1, 4)).astype(np.float32)
    got = normalize(x, 0.5, 2.0, scale, bias)
    np.testing.assert_allclose(got, expected(x, 0.5, 2, scale, bias), atol=16 * EPS["float32"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_normalize_guarantee_float32_inside(rng, dtype):
    x = jnp.asarray(rng.normal(100, 1, (64, 3)), dtype)
    scale = jnp.asarray([0.5, 1, 2], dtype)
    exact = np.asarray(x, np.float64)
    got = normalize(x, exact.mean(0).astype(np.float32), exact.var(0).astype(np.float32), scale)
    want = expected(exact, exact.mean(0), exact.var(0), np.asarray(scale, np.float64))
    assert got.dtype == dtype
    # One rounding to the output dtype, beside the float32 error of a mean of 100.
    bound = EPS[dtype] / 2 * np.abs(want) + 8 * EPS["float32"] * (1 + 100)
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)
    assert normalize(x, 0.0, 1.0, dtype=jnp.float32).dtype == jnp.float32


def test_normalize_guarantee_offset_costs_nothing():
    # 2^23 + 1 and 2^23 + 2 are neighbors in float32; x * a + b would round them to the same value.
    x = jnp.array([2.0**23 + 1, 2.0**23 + 2], jnp.float32)
    np.testing.assert_array_equal(normalize(x, 2.0**23, 1.0, epsilon=0.0), [1, 2])


def test_normalize_guarantee_light_backward(saved_arrays):
    x, c = jnp.ones((8, 5, 3), jnp.bfloat16), jnp.ones(3)
    kept = saved_arrays(lambda *a: normalize(*a), x, c, c, c, c)
    assert [k for k in kept if k.size >= x.size] == [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    # Where only x is differentiated, its derivative is a vector and x is not needed at all.
    kept = saved_arrays(lambda x: normalize(x, c, c, c, c), x)
    assert not [k for k in kept if k.size >= x.size]
    # Where x is not differentiated, no array of zeros replaces its tangent.
    kept = saved_arrays(lambda *a: normalize(x, *a), c, c, c, c)
    assert [k for k in kept if k.size >= x.size] == [jax.ShapeDtypeStruct(x.shape, x.dtype)]


def test_normalize_edge_var_0():
    got = normalize(jnp.array([2.0, 3.0]), 2.0, 0.0, epsilon=1e-4)
    np.testing.assert_allclose(got, [0, 100], rtol=1e-6)


def test_normalize_edge_masked_nan_or_infinity():
    x = jnp.array([1.0, jnp.nan, -jnp.inf, 4.0])
    mask = jnp.array([True, False, False, False])
    got, pullback = jax.vjp(lambda x: normalize(x, 1.0, 4.0, epsilon=0.0, mask=mask), x)
    np.testing.assert_array_equal(got, [0, -0.5, -0.5, 1.5])
    np.testing.assert_array_equal(pullback(jnp.ones(4))[0], [0.5, 0, 0, 0.5])


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e15])
def test_gradients_stay_in_range_for_any_unit_of_x(rng, size):
    # var^(-3/2) is 1e36 and 1e-45, at and beyond the ends of the range of float32.
    x = (rng.normal(size=(64,)) * size).astype(np.float32)
    exact = x.astype(np.float64)
    mean, var = exact.mean(), exact.var()

    def loss(x, mean, var):
        return jnp.sum(normalize(x, mean, var, epsilon=0.0) ** 3)

    dx, dmean, dvar = jax.grad(loss, (0, 1, 2))(x, jnp.float32(mean), jnp.float32(var))
    y = (exact - mean) / var**0.5
    np.testing.assert_allclose(dx, 3 * y**2 / var**0.5, rtol=1e-5, atol=1e-5 / var**0.5)
    np.testing.assert_allclose(dmean, -(3 * y**2).sum() / var**0.5, rtol=1e-5)
    np.testing.assert_allclose(dvar, -(1.5 * y**3).sum() / var, rtol=1e-4)


def test_every_argument_has_the_derivative_of_the_formula(rng, x64):
    args = [rng.random(s) + 0.5 for s in ((5, 4), (4,), (4,), (4,), (4,))]
    directions = [rng.normal(size=a.shape) for a in args]

    def formula(x, mean, var, scale, bias):
        return (x - mean) * (var + 0.1) ** -0.5 * scale + bias

    _, got = jax.jvp(lambda *a: normalize(*a, epsilon=0.1), args, directions)
    want = (
        np.imag(formula(*(a + 1e-30j * d for a, d in zip(args, directions, strict=True)))) / 1e-30
    )
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_numbers_take_the_dtype_of_x(x64):
    assert "f64" not in str(
        jax.make_jaxpr(lambda x: normalize(x, 2.0, 4))(jnp.ones(3, jnp.float32))
    )


def test_complex_scale_and_real_variance(rng):
    z = (rng.normal(size=(6, 3)) + 1j * rng.normal(size=(6, 3))).astype(np.complex64)
    got = normalize(z, z.mean(0), np.ones(3, np.float32), np.full(3, 2j, np.complex64))
    want = (z.astype(np.complex128) - z.mean(0)) / np.sqrt(1 + 1e-5) * 2j
    np.testing.assert_allclose(got, want, atol=16 * EPS["float32"])


def test_condition_of_the_oracle():
    assert reference.condition(3.0, 4.0, 0.0) == 2.5
