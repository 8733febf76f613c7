"""Passes over memory: nothing of the size of x is written but the results; maps are linear."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from benchmarks import hlo
from normjax._core.linear import rounded_sum
from normjax._core.platforms.cpu import isolate, materialize
from tests import reference
from tests.compiling import DEFAULT

NORMS = {
    "batch": ((32, 8, 8, 16), lambda x, s, b: normjax.batch_norm(x, None, s, b, train=True)[0]),
    "layer": ((256, 512), normjax.layer_norm),
    "rms": ((256, 512), lambda x, s, b: normjax.rms_norm(x, s)),
    "group": ((4, 16, 16, 32), partial(normjax.group_norm, num_groups=8)),
    "instance": ((4, 16, 16, 32), normjax.instance_norm),
}


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="its compiler fuses other things")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_a_training_step_writes_nothing_of_the_size_of_x_but_its_results(norm, dtype):
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
    wide = cotangent.astype(jnp.float32)
    whole, row, column = jax.vjp(total, *terms)[1](cotangent)
    np.testing.assert_array_equal(whole, wide)
    np.testing.assert_allclose(row, wide.sum(0, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(column, wide.sum(1, keepdims=True), rtol=1e-6)
    # With one term held fast the others keep theirs.
    np.testing.assert_array_equal(
        jax.vjp(lambda t: total(t, *terms[1:]), terms[0])[1](cotangent)[0], wide
    )


def test_isolate_is_the_identity_in_every_transformation(rng):
    x, v = jnp.asarray(rng.normal(size=(3, 4))), jnp.arange(4.0)[None]

    def f(x):
        own, vector = isolate((x, v))
        return jnp.sum(jnp.sin(own) * vector)

    def plain(x):
        return jnp.sum(jnp.sin(x) * v)

    for transform in (lambda f: f, jax.jit, jax.grad, jax.hessian, jax.jacfwd):
        np.testing.assert_allclose(transform(f)(x), transform(plain)(x), rtol=1e-6)
    each = jax.vmap(lambda row: isolate((row, row[0]))[0])(x)
    np.testing.assert_array_equal(each, x)


def test_materialize_is_the_identity_in_every_transformation(rng):
    v = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32).at[0, :3].set([np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(jax.jit(materialize)(v), v)
    np.testing.assert_array_equal(jax.jit(jax.vmap(materialize))(v), v)
    np.testing.assert_array_equal(jax.jit(lambda v: jax.vjp(materialize, v)[1](v)[0])(v), v)
    np.testing.assert_array_equal(jax.jit(lambda v: jax.jvp(materialize, (v,), (v,))[1])(v), v)
    z = jnp.asarray([1 + 2j, np.inf - 1j], jnp.complex64)
    np.testing.assert_array_equal(jax.jit(materialize)(z), z)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="its compiler fuses other things")
def test_no_pass_over_x_spreads_the_vectors_of_groups():
    x = jnp.ones((4, 16, 16, 30), jnp.bfloat16)
    function = partial(normjax.group_norm, num_groups=6)
    compiled = jax.jit(function, compiler_options=DEFAULT).lower(x).compile()
    shapes = [
        {shape for instruction in computation for shape in instruction.shapes}
        for computation in hlo.parse(compiled.as_text()).computations.values()
    ]
    passes = [found for found in shapes if hlo.Shape("f32", (4, 16, 16, 30)) in found]
    assert passes
    assert not [found for found in passes if hlo.Shape("f32", (4, 6, 5)) in found]


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="its compiler fuses other things")
def test_sums_between_kept_axes_take_two_steps_backwards_too():
    """Each sum over both axes is one of what a sum over the last axis has left."""

    def step(x, dy):
        y, pullback = jax.vjp(normjax.instance_norm, x)
        return y, pullback(dy)

    x = jnp.ones((4, 16, 16, 8))
    program = hlo.parse(jax.jit(step, compiler_options=DEFAULT).lower(x, x).compile().as_text())
    sums = [i.dimensions for i in program if i.opcode == "reduce"]
    assert sums.count((2,)) == sums.count((1, 2)) == 5


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
    """What two passes send back to x meets in float32: not beyond half a unit in the last place."""
    function, options = ROUNDED[norm]
    x, dy = (jnp.asarray(rng.normal(size=(65, 4, 9)), jnp.bfloat16) for _ in range(2))
    got = jax.vjp(function, x)[1](dy)[0]
    exact = reference.standardized(x, 1.0, 0.0, dy, **options).dx
    half_a_unit = 2.0 ** (np.frexp(exact)[1] - 9)
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= 1.01 * half_a_unit + 1e-6)
