"""Passes over memory: no temporaries of the size of x, and gradients are rounded once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from normjax._core.linear import rounded_sum
from normjax._core.platforms import kernels
from tests import reference
from tests.compiling import DEFAULT

NORMS = {
    "batch": ((32, 8, 8, 16), lambda x, s, b: normjax.batch_norm(x, None, s, b, train=True)[0]),
    "layer": ((256, 512), normjax.layer_norm),
    "rms": ((256, 512), lambda x, s, b: normjax.rms_norm(x, s)),
    "group": ((4, 16, 16, 32), partial(normjax.group_norm, num_groups=8)),
    "instance": ((4, 16, 16, 32), normjax.instance_norm),
}


@pytest.mark.skipif(kernels.plugin() is None, reason="normjax-cpu is not installed")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older XLA fuses other operations")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_a_training_step_has_no_temporaries_of_the_size_of_x(norm, dtype):
    shape, function = NORMS[norm]

    def step(x, dy, scale, bias):
        y, pullback = jax.vjp(function, x, scale, bias)
        return y, pullback(dy)

    x, vector = jnp.ones(shape, dtype), jnp.ones(shape[-1])
    program = jax.jit(step, compiler_options=DEFAULT).lower(x, x, vector, vector).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < x.nbytes / 2


def total(*terms):
    return rounded_sum((3, 4), jnp.bfloat16, *terms)


def test_the_sum_is_rounded_once_and_differentiates_like_a_sum(rng):
    terms = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4), (1, 4), (3, 1)))
    expected = (terms[0] + terms[1] + terms[2]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(total(*terms), expected)
    np.testing.assert_array_equal(jax.jit(total)(*terms), expected)
    np.testing.assert_array_equal(jax.jvp(total, terms, terms)[1], expected)
    np.testing.assert_array_equal(
        jax.vmap(total, (0, None, 0))(
            *(jnp.stack([t, t]) for t in terms[:1]), terms[1], jnp.stack([terms[2]] * 2)
        ),
        jnp.stack([expected] * 2),
    )
    cotangent = jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16)
    unrounded = cotangent.astype(jnp.float32)
    whole, row, column = jax.vjp(total, *terms)[1](cotangent)
    np.testing.assert_array_equal(whole, unrounded)
    np.testing.assert_allclose(row, unrounded.sum(0, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(column, unrounded.sum(1, keepdims=True), rtol=1e-6)
    # The other terms may be constants.
    np.testing.assert_array_equal(
        jax.vjp(lambda t: total(t, *terms[1:]), terms[0])[1](cotangent)[0], unrounded
    )


ROUNDED = {
    "batch": (
        lambda x: normjax.batch_norm(x, None, train=True, feature_axis=1)[0],
        dict(axes=(0, 2)),
    ),
    "layer": (partial(normjax.layer_norm, axis=(1, 2), epsilon=1e-5), dict(axes=(1, 2))),
    "rms": (
        partial(normjax.rms_norm, axis=(1, 2), epsilon=1e-5),
        dict(axes=(1, 2), centered=False),
    ),
    "group": (
        partial(normjax.group_norm, num_groups=4, feature_axis=1, epsilon=1e-5),
        dict(axes=(2,)),
    ),
}


@pytest.mark.parametrize("norm", ROUNDED)
def test_a_half_precision_gradient_is_rounded_once(norm, rng):
    """Parts of the gradient are added in float32: the error is half a unit in the last place."""
    function, options = ROUNDED[norm]
    x, dy = (jnp.asarray(rng.normal(size=(65, 4, 9)), jnp.bfloat16) for _ in range(2))
    got = jax.vjp(function, x)[1](dy)[0]
    exact = reference.standardized(x, 1.0, 0.0, dy, **options).dx
    half_a_unit = 2.0 ** (np.frexp(exact)[1] - 9)
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= 1.01 * half_a_unit + 1e-6)
