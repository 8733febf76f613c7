"""Laws that hold for every norm of the table in tests/descriptors.py.

Adapters are tested for what they pass to the functions; the other laws test functions only. Where
possible, all laws of a norm use the same compiled program.
"""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.jet import jet

import normjax
import normjax.linen
import normjax.nnx
from tests.descriptors import ADAPTERS, NORMS, PLAIN, UNMASKED
from tests.reference import EPS

every_norm = pytest.mark.parametrize("name", NORMS)
every_function = pytest.mark.parametrize("name", [n for n in NORMS if n not in ADAPTERS])


@cache
def compiled(name):
    """The norm as one program for each kind of input, for all laws."""
    return jax.jit(NORMS[name].call)


@pytest.fixture
def case(name, rng):
    norm = NORMS[name]
    x = rng.normal(1, 2, norm.shape).astype(np.float32)
    mask = rng.random(norm.mask_shape) < 0.7
    return norm.call, x, mask


def public_norms():
    others = {"choose_normalization", "norm_inputs_saveable"}
    names = [n for n in normjax.__all__ if "norm" in n and n not in others]
    functions = [getattr(normjax, n) for n in names]
    modules = (normjax.linen, normjax.nnx)
    classes = [getattr(m, n) for m in modules for n in m.__all__ if n[0].isupper()]
    return functions + [c for c in classes if issubclass(c, (nn.Module, nnx.Module))]


def test_every_public_norm_is_in_the_table():
    missing = set(public_norms()) - {norm.public for norm in NORMS.values()} - UNMASKED
    assert not missing
    assert {normjax.linen.LayerNorm, normjax.nnx.LayerNorm} <= set(public_norms())


@every_norm
def test_jit_equals_eager_and_numpy_input_equals_jax_input(name, case):
    call, x, mask = case
    eager = call(x, mask)
    for other in (compiled(name)(x, mask), call(jnp.asarray(x), jnp.asarray(mask))):
        np.testing.assert_allclose(other, eager, atol=64 * EPS["float32"])


@every_norm
def test_promise_2_half_precision_in_and_out(case):
    call, x, mask = case
    for dtype in ("bfloat16", "float16", "float32"):
        y = call(jnp.asarray(x, dtype), mask)
        assert y.dtype == dtype
        exact = call(np.asarray(jnp.asarray(x, dtype), np.float32), mask)
        bound = EPS[dtype] * abs(np.asarray(exact)) + 64 * EPS["float32"]
        assert np.all(abs(np.asarray(y, np.float32) - exact) <= bound)


@every_norm
def test_promise_4_nothing_at_a_masked_entry_reaches_another(case, rng):
    call, x, mask = case
    dy = rng.normal(size=x.shape).astype(np.float32)

    @jax.jit
    def both(x):
        y, pullback = jax.vjp(lambda x: call(x, mask), x)
        _, pushed = jax.jvp(lambda x: call(x, mask), (x,), (dy,))
        return y, pullback(dy)[0], pushed

    zeroed = both(np.where(mask, x, np.float32(0)))
    for poison in (np.nan, np.inf, -np.inf):
        poisoned = both(np.where(mask, x, np.float32(poison)))
        for a, b in zip(poisoned, zeroed, strict=True):
            assert np.isfinite(a).all()
            here = np.broadcast_to(mask, x.shape)
            np.testing.assert_array_equal(np.asarray(a)[here], np.asarray(b)[here])


@every_function
@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
def test_promise_1_a_large_offset_costs_its_own_rounding(name, rng, x64, offset):
    """float32 against float64, which the tests of each norm compare with the oracle.

    The mean of entries around m rounds by eps m, that is by eps m / s in units of the deviation,
    and scale and slope of the table are at most 2.
    """
    norm = NORMS[name]
    # Neighbors on every axis differ by at least one, so no deviation is small.
    i, j, k = np.indices(norm.shape)
    x = (offset + (i + 2 * j + 3 * k) % 5 + rng.random(norm.shape) / 4).astype(np.float32)
    exact = np.asarray(compiled(name)(x.astype(np.float64)))
    got = np.asarray(compiled(name)(x), np.float64)
    unit = EPS["float32"] * (1 + offset) * 2
    assert np.max(abs(got - exact) / np.maximum(1, abs(exact))) <= 16 * unit


@every_function
def test_a_full_mask_equals_no_mask(name, case):
    _, x, mask = case
    full, none = compiled(name)(x, np.ones_like(mask)), compiled(name)(x)
    np.testing.assert_allclose(full, none, atol=64 * EPS["float32"])


@every_function
def test_promise_6_forward_mode_is_the_transpose_of_reverse_mode(case, rng):
    call, x, mask = case
    v, w = rng.normal(size=(2, *x.shape)).astype(np.float32)

    @jax.jit
    def both(x, v, w, mask):
        found = []
        for f in (call, jax.checkpoint(call), jax.jit(call)):
            _, pushed = jax.jvp(lambda x, f=f: f(x, mask), (x,), (v,))
            _, pullback = jax.vjp(lambda x, f=f: f(x, mask), x)
            found.append((pushed, pullback(w)[0]))
        return found

    for pushed, pulled in both(x, v, w, mask):
        assert np.vdot(w, pushed) == pytest.approx(np.vdot(pulled, v), rel=1e-4, abs=1e-3)


@every_function
def test_promise_6_vmap_equals_a_loop(case):
    call, x, mask = case
    xs = np.stack([x, x[::-1] + 1, 3 * x])
    masks = np.stack([mask, ~mask, mask[::-1]])

    def both(x, mask):
        return call(x, mask), jax.grad(lambda x: jnp.sum(call(x, mask) ** 2))(x)

    batched, alone = jax.jit(jax.vmap(both))(xs, masks), jax.jit(both)
    for i in range(3):
        for got, want in zip(batched, alone(xs[i], masks[i]), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-4)


@every_function
def test_promise_6_scan(name, case):
    call, x, mask = case
    xs = np.stack([x, 2 * x])
    _, ys = jax.lax.scan(lambda carry, x: (carry, call(x, mask)), 0, xs)
    np.testing.assert_allclose(ys[1], compiled(name)(xs[1], mask), atol=64 * EPS["float32"])


@every_function
def test_promise_6_second_derivatives_of_a_scan(case):
    """JAX differentiates the traced derivative rule there, and applies no custom rule again."""
    call, x, mask = case
    v = np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)

    def twice(x):
        return jax.lax.scan(lambda t, _: (jnp.sin(call(t, mask)), None), x, None, 2)[0]

    def unrolled(x):
        return jnp.sin(call(jnp.sin(call(x, mask)), mask))

    @jax.jit
    def products(x, v):
        losses = [lambda x, f=f: jnp.sum(f(x) ** 2) for f in (twice, unrolled)]
        return [jax.jvp(jax.grad(loss), (x,), (v,))[1] for loss in losses]

    got, want = products(x, v)
    size = max(1, np.max(np.abs(want)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("name", NORMS | PLAIN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_promise_7_only_x_and_vectors_are_kept(name, dtype, rng, saved_arrays):
    norm = (NORMS | PLAIN)[name]
    x = jnp.asarray(rng.normal(1, 2, norm.shape), dtype)
    masks = [None] if name in PLAIN else [None, rng.random(norm.mask_shape) < 0.7]
    for mask in masks:
        kept = saved_arrays(lambda x, mask=mask: norm.call(x, mask), x)
        large = [(k.size, k.dtype) for k in kept if k.size >= x.size]
        # Where the statistics do not depend on x, not even x is needed.
        assert large in ([], [(x.size, dtype)])


@every_function
def test_no_tracer_leaks(case):
    call, x, mask = case
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda x: jnp.sum(call(x, mask))))(x)


@every_norm
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_promise_9_integers_are_refused_with_a_remedy(name, dtype):
    norm = NORMS[name]
    with pytest.raises(TypeError, match=r"normjax\..*: x has dtype .*, expected .* Convert"):
        norm.call(np.ones(norm.shape, dtype))


@every_norm
def test_promise_9_an_ambiguous_mask_is_refused_with_both_readings(name):
    call = NORMS[name].call
    with pytest.raises(ValueError, match=r"leading axes, pass mask.reshape\(\(4, 1, 1\)\)"):
        call(np.ones((4, 4, 3), np.float32), np.ones(4, bool))
    with pytest.raises(
        ValueError, match=r"two readings.*reshape\(\(3, 3, 1\)\).*reshape\(\(1, 3, 3\)\)"
    ):
        call(np.ones((3, 3, 3), np.float32), np.ones((3, 3), bool))


def test_jet_fails_at_custom_derivative_rules():
    """Promise 6 excludes Taylor mode, since JAX's own ReLU fails as well. Include it when this does
    not raise."""
    one = jnp.ones(3)
    for function in (jax.nn.relu, normjax.dynamic_tanh):
        with pytest.raises(jax.errors.UnexpectedTracerError):
            jet(function, (one,), ((one,),))
