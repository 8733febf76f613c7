"""Second derivatives at the tie of a maximum, a minimum or a selection.

A constant feature has the variance 0, and rounding may make it negative. The operation that
prevents this must not change a derivative. A masked entry differs from the constant, so that its
output depends on the second derivative of the variance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from tests import reference

SHAPE = (4, 3, 2)


def over_devices(x, mask):
    def one(x, mask):
        return normjax.batch_norm(x, None, train=True, mask=mask, axis_name="d")[0]

    return jax.vmap(one, axis_name="d")(x, mask)


NORMS = {
    "batch_norm": (
        lambda x, m: normjax.batch_norm(x, None, train=True, mask=m)[0],
        dict(axes=(0, 1)),
    ),
    "batch_norm over devices": (over_devices, dict(axes=(0, 1))),
    "group_norm": (
        lambda x, m: normjax.group_norm(x, num_groups=1, epsilon=1e-5, mask=m),
        dict(axes=(1, 2)),
    ),
    "filter_response_norm": (
        lambda x, m: normjax.filter_response_norm(
            x, threshold=jnp.full(2, -1e9), epsilon=1e-5, mask=m
        ),
        dict(axes=(1,), centered=False),
    ),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_second_derivatives_at_a_constant_equal_the_formula(norm, value, rng, x64):
    function, options = NORMS[norm]
    x, mask = np.full(SHAPE, value), np.ones(SHAPE, bool)
    mask[:, 0] = rng.random((4, 2)) < 0.5
    x = np.where(mask, x, value + 1e-3 * rng.normal(size=SHAPE))
    dy, v = rng.normal(size=(2, *SHAPE))

    def dx(x):
        return reference.standardized(x, 1.0, 0.0, dy, mask=mask, **options).dx

    want = reference.complex_step(dx, x, v)
    gradient = jax.grad(lambda x: jnp.vdot(dy, function(x, mask)))
    forward = jax.jit(lambda x: jax.jvp(gradient, (x,), (v,))[1])(x)
    reverse = jax.jit(jax.grad(lambda x: jnp.vdot(v, gradient(x))))(x)
    bound = 1e-9 * np.max(abs(want))
    np.testing.assert_allclose(forward, want, atol=bound)
    np.testing.assert_allclose(reverse, want, atol=bound)
