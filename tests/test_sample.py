"""Layer, RMS, group and instance norm against the oracle, PyTorch and their edge cases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from tests import reference
from tests.reference import EPS

# name: function with its options, shape, axes reduced after `split`, shape of scale, groups
CASES = {
    "layer, rows": (partial(layer_norm), (6, 5), (-1,), (5,), None),
    "layer, sequence": (partial(layer_norm), (3, 4, 6), (-1,), (6,), None),
    "layer, two axes": (partial(layer_norm, axis=(1, 2)), (4, 3, 5), (1, 2), (3, 5), None),
    "layer, scale of the last axis": (
        partial(layer_norm, axis=(1, 2, 3), feature_axis=-1),
        (3, 4, 2, 5),
        (1, 2, 3),
        (5,),
        None,
    ),
    "layer, features first": (partial(layer_norm, axis=1), (3, 5, 4), (1,), (5,), None),
    "layer, of one": (partial(layer_norm), (4, 1), (-1,), (1,), None),
    "rms, rows": (partial(rms_norm), (6, 5), (-1,), (5,), None),
    "rms, volumes": (partial(rms_norm, axis=(-2, -1)), (2, 3, 2, 4, 5), (3, 4), (4, 5), None),
    "rms, features first": (partial(rms_norm, axis=1), (3, 5, 4), (1,), (5,), None),
    "group, images": (partial(group_norm, num_groups=3), (2, 3, 4, 6), (1, 2, -1), (6,), 3),
    "group, by size": (partial(group_norm, group_size=2), (3, 5, 8), (1, -1), (8,), 4),
    "group, features first": (
        partial(group_norm, num_groups=2, feature_axis=1),
        (3, 6, 4),
        (2, 3),
        (6,),
        2,
    ),
    "group, rows": (partial(group_norm, num_groups=2), (5, 6), (-1,), (6,), 2),
    "group, two batch axes": (
        partial(group_norm, num_groups=2, axis=(2, -1)),
        (2, 3, 4, 6),
        (2, -1),
        (6,),
        2,
    ),
    "instance, images": (partial(instance_norm), (3, 4, 5, 2), (1, 2), (2,), None),
    "instance, features first": (
        partial(instance_norm, feature_axis=1),
        (3, 2, 4, 2, 3),
        (2, 3, 4),
        (2,),
        None,
    ),
    "instance, of one": (partial(instance_norm), (3, 1, 4), (1,), (4,), None),
}
EPSILON = 1e-3


def feature_axes(function):
    """The axes of scale, from the options of the case."""
    options = function.keywords
    return options.get(
        "feature_axis", options.get("axis", -1) if "group" not in str(function.func) else -1
    )


def placed(vector, function, rank):
    """A vector of features, reshaped to the rank of x."""
    kept = np.atleast_1d(feature_axes(function)) % rank
    shape = [1] * rank
    for axis, n in zip(sorted(kept), vector.shape, strict=True):
        shape[axis] = n
    return vector.reshape(shape)


def oracle(name, x, scale, bias, dy, mask):
    function, _, axes, _, groups = CASES[name]
    centered = function.func is not rms_norm
    scale, bias = (placed(v, function, x.ndim) for v in (scale, bias))
    if groups is None:
        axes = tuple(a % x.ndim for a in axes)
        return reference.standardized(
            x, scale, bias, dy, axes=axes, mask=mask, epsilon=EPSILON, centered=centered
        )
    feature = function.keywords.get("feature_axis", -1) % x.ndim

    def split(v):
        n = v.shape[feature]
        two = (groups, n // groups) if n > 1 else (1, 1)
        return v.reshape(v.shape[:feature] + two + v.shape[feature + 1 :])

    axes = tuple(a % (x.ndim + 1) for a in axes)
    mask = None if mask is None else split(mask)
    r = reference.standardized(
        *map(split, (x, scale, bias, dy)), axes=axes, mask=mask, epsilon=EPSILON
    )
    scale_shape = scale.shape
    return r._replace(
        y=r.y.reshape(x.shape),
        dx=r.dx.reshape(x.shape),
        dscale=r.dscale.reshape(scale_shape),
        dbias=r.dbias.reshape(scale_shape),
    )


def run(function, x, scale, bias, dy, mask):
    """y and the gradients of x, scale and (but for RMS norm) bias."""
    args = (x, scale) if function.func is rms_norm else (x, scale, bias)

    @jax.jit
    def both(args, dy):
        y, pullback = jax.vjp(lambda *a: function(*a, mask=mask, epsilon=EPSILON), *args)
        return y, *pullback(dy)

    return jax.tree.map(np.asarray, both(args, dy))


def draw(name, rng, dtype):
    function, shape, _, features, _ = CASES[name]
    x, dy = rng.normal(1, 2, (2, *shape)).astype(dtype)
    scale, bias = rng.normal(1, 0.5, (2, *features)).astype(dtype)
    return function, x, scale, bias * (function.func is not rms_norm), dy


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_float64_equals_the_oracle(rng, x64, name, masked):
    function, *args = draw(name, rng, np.float64)
    mask = rng.random(args[0].shape) < 0.7 if masked else None
    got = run(function, *args, mask)
    want = oracle(name, *args, mask)
    for g, w in zip(got, (want.y, want.dx, want.dscale, want.dbias), strict=False):
        np.testing.assert_allclose(g, w.reshape(g.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_rounded_once(rng, name, dtype):
    function, *args = draw(name, rng, np.float32)
    x, scale, bias, dy = (jnp.asarray(v, dtype) for v in args)
    y, dx = run(function, x, scale, bias, dy, None)[:2]
    exact = [np.asarray(v, np.float64) for v in (x, scale, bias, dy)]
    want = oracle(name, *exact, None)
    assert y.dtype == dx.dtype == jnp.dtype(dtype)
    # At most 60 entries to a statistic, x / s at most 10 with this epsilon.
    single = 64 * EPS["float32"] * 10
    assert np.all(abs(y.astype(np.float64) - want.y) <= EPS[dtype] * abs(want.y) + single)
    largest = np.abs(exact[1]).max() * np.abs(exact[3]).max() / np.sqrt(want.var + EPSILON).min()
    assert np.all(abs(dx.astype(np.float64) - want.dx) <= 2 * (EPS[dtype] + single) * largest)


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_guarantee_float32_inside(rng, function):
    x = jnp.asarray(rng.normal(100, 1, (4, 256)), jnp.bfloat16)
    centered = function is layer_norm
    want = reference.standardized(x, 1, 0, x, axes=(1,), epsilon=1e-6, centered=centered).y
    got = np.asarray(function(x, dtype=jnp.float32), np.float64)
    np.testing.assert_allclose(got, want, atol=16 * EPS["float32"] * 100)


def test_layer_norm_guarantee_float32_inside(rng):
    test_guarantee_float32_inside(rng, layer_norm)


def test_rms_norm_guarantee_float32_inside(rng):
    test_guarantee_float32_inside(rng, rms_norm)


def stable(function, x, axes):
    want = reference.standardized(x, 1, 0, x, axes=axes, epsilon=1e-6)
    unit = EPS["float32"] * reference.condition(want.mean, want.var, 1e-6)
    error = np.abs(np.asarray(function(x), np.float64) - want.y)
    return np.max(error / (unit * np.maximum(1, np.abs(want.y))))


@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
def test_layer_norm_guarantee_stable(rng, offset):
    x = rng.normal(offset, 1, (8, 768)).astype(np.float32)
    assert stable(layer_norm, x, (1,)) <= 16


@pytest.mark.parametrize("offset", [0, 1e4])
def test_group_norm_guarantee_stable(rng, offset):
    x = rng.normal(offset, 1, (2, 64, 8)).astype(np.float32)
    assert stable(partial(group_norm, num_groups=1), x, (1, 2)) <= 16


@pytest.mark.parametrize("offset", [0, 1e4])
def test_instance_norm_guarantee_stable(rng, offset):
    x = rng.normal(offset, 1, (2, 256, 4)).astype(np.float32)
    assert stable(instance_norm, x, (1,)) <= 16


FAMILY = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": partial(group_norm, num_groups=2),
    "instance_norm": instance_norm,
}


def masked_out(function, rng):
    """Values and derivatives do not change if masked entries are NaN, infinite or 0."""
    x, dy = rng.normal(1, 2, (2, 3, 6, 4)).astype(np.float32)
    mask = rng.random((3, 6, 4)) < 0.7

    def both(x):
        y, pullback = jax.vjp(lambda x: function(x, mask=mask), x)
        return y, pullback(dy)[0]

    zeroed = both(np.where(mask, x, np.float32(0)))
    for poison in (np.nan, np.inf):
        for a, b in zip(both(np.where(mask, x, np.float32(poison))), zeroed, strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(np.asarray(a)[mask], np.asarray(b)[mask])


def light_backward(function, saved_arrays):
    for dtype in (jnp.bfloat16, jnp.float32):
        x, vector = jnp.ones((3, 50, 8), dtype), jnp.ones(8)
        args = (x, vector) if function is rms_norm else (x, vector, vector)
        kept = saved_arrays(function, *args)
        large = {(k.size, k.dtype) for k in kept if k.size >= x.size}
        assert large == {(x.size, x.dtype)}
        assert len([k for k in kept if k.size >= x.size]) == 1
        assert sum(k.size for k in kept if k.size < x.size) < x.size


def test_layer_norm_guarantee_masked_out_means_out(rng):
    masked_out(layer_norm, rng)


def test_rms_norm_guarantee_masked_out_means_out(rng):
    masked_out(rms_norm, rng)


def test_group_norm_guarantee_masked_out_means_out(rng):
    masked_out(FAMILY["group_norm"], rng)


def test_instance_norm_guarantee_masked_out_means_out(rng):
    masked_out(instance_norm, rng)


def test_layer_norm_guarantee_light_backward(saved_arrays):
    light_backward(layer_norm, saved_arrays)


def test_rms_norm_guarantee_light_backward(saved_arrays):
    light_backward(rms_norm, saved_arrays)


def test_group_norm_guarantee_light_backward(saved_arrays):
    light_backward(FAMILY["group_norm"], saved_arrays)


def test_instance_norm_guarantee_light_backward(saved_arrays):
    light_backward(instance_norm, saved_arrays)


def test_layer_norm_edge_one_element():
    y = layer_norm(jnp.array([[3.0], [-1e9]]), jnp.array([5.0]), jnp.array([2.0]))
    np.testing.assert_array_equal(y, [[2], [2]])


def test_layer_norm_edge_constant_example():
    x = jnp.broadcast_to(jnp.array([[0.1], [1e6 / 7]]), (2, 1000))
    np.testing.assert_array_equal(layer_norm(x), np.zeros((2, 1000)))


def test_layer_norm_edge_example_with_every_entry_masked():
    x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    mask = jnp.array([[False], [True]])
    y = layer_norm(x, bias=jnp.ones(2), epsilon=0.25, mask=mask)
    np.testing.assert_allclose(y[0], [1 / 0.5 + 1, 2 / 0.5 + 1])


# For n = 100 entries, 1.8e19 / sqrt(n) is 1.8e18.
SIGNS = np.tile([1.0, -1.0], 50)
SIZES = [(1.8e18, True), (1.9e18, False), (1e20, False)]


@pytest.mark.parametrize(("size", "inside"), SIZES)
def test_layer_norm_edge_deviations_beyond_1_8e19_sqrt_n(size, inside):
    y = layer_norm(jnp.asarray(size * SIGNS, jnp.float32), bias=jnp.ones(100))
    np.testing.assert_allclose(y, 1 + SIGNS * inside, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("far", [0, 1], ids=["scattered", "constant"])
def test_squares_beyond_the_range_are_infinite_and_not_nan(rng, far):
    """Since the variance is infinite, y is the bias, here 0."""
    x = 1e30 * (far + (1 - far) * rng.normal(size=(3, 40, 8)))
    x = jnp.asarray(x / 7, jnp.float32)
    for norm in (
        layer_norm,
        instance_norm,
        partial(group_norm, num_groups=2),
        lambda x: batch_norm(x, None, train=True)[0],
    ):
        y, pullback = jax.vjp(norm, x)
        np.testing.assert_array_equal(y, 0)
        assert np.all(np.isfinite(pullback(jnp.ones_like(x))[0]))


@pytest.mark.parametrize(("size", "inside"), SIZES)
def test_rms_norm_edge_x_beyond_1_8e19_sqrt_n(size, inside):
    y = rms_norm(jnp.asarray(size * SIGNS, jnp.float32))
    np.testing.assert_allclose(y, SIGNS * inside, rtol=1e-6)


def through_the_variance(norm, centered, rng):
    """For a small dy, the part of dx through the variance is 0; the formula is used without it."""
    x, dy = rng.normal(size=(2, 2, 40))
    x, dy = (1e15 * x).astype(np.float32), dy + x / 1e15
    _, pullback = jax.vjp(norm, x)
    for size, inside in ((1e-5, True), (1e-10, False)):
        (dx,) = pullback((size * dy).astype(np.float32))
        r = reference.standardized(x, 1.0, 0.0, size * dy, axes=(1,), centered=centered)
        direct = size * (dy - centered * dy.mean(1, keepdims=True)) / np.sqrt(r.var)
        want = r.dx if inside else direct
        np.testing.assert_allclose(dx, want, atol=1e-5 * np.max(abs(want)))


def test_layer_norm_edge_dy_below_1e_38_var(rng):
    through_the_variance(layer_norm, True, rng)


def test_rms_norm_edge_dy_below_1e_38_mean_x_2(rng):
    through_the_variance(rms_norm, False, rng)


def test_an_empty_batch_stays_empty():
    for norm in FAMILY.values():
        assert norm(jnp.zeros((0, 3, 4))).shape == (0, 3, 4)


def test_rms_norm_edge_one_element():
    y = rms_norm(jnp.array([[3.0], [-7.0]]), jnp.array([5.0]))
    np.testing.assert_allclose(y, [[5], [-5]], rtol=1e-6)


def test_rms_norm_edge_zeros():
    y, pullback = jax.vjp(rms_norm, jnp.zeros((2, 4)))
    np.testing.assert_array_equal(y, np.zeros((2, 4)))
    assert np.isfinite(pullback(jnp.ones((2, 4)))[0]).all()


def test_group_norm_edge_one_group(rng):
    x = rng.normal(1, 2, (3, 5, 4)).astype(np.float32)
    want = layer_norm(x, axis=(1, 2), feature_axis=-1)
    np.testing.assert_allclose(group_norm(x, num_groups=1), want, atol=1e-6)


def test_group_norm_edge_groups_of_one_feature(rng):
    x = rng.normal(1, 2, (3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(group_norm(x, group_size=1), instance_norm(x), atol=1e-6)


def test_instance_norm_edge_one_element():
    np.testing.assert_array_equal(instance_norm(jnp.full((2, 1, 3), 7.0)), np.zeros((2, 1, 3)))


@pytest.mark.parametrize("name", FAMILY)
def test_scale_and_bias_may_differ_for_each_example(rng, name):
    x = rng.normal(1, 2, (3, 6, 4)).astype(np.float32)
    scale, bias = rng.normal(1, 1, (2, 3, 4)).astype(np.float32)
    bias = bias * (name != "rms_norm")
    affine = (scale,) if name == "rms_norm" else (scale, bias)
    got = FAMILY[name](x, *affine)
    for i in range(3):
        row = [v[i] for v in affine]
        np.testing.assert_allclose(got[i], FAMILY[name](x[i : i + 1], *row)[0], atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_reduced_axes_may_be_split_over_devices(rng, name):
    """Positions on four devices; for group norm also the channels of its groups."""
    x = rng.normal(1, 2, (4, 3, 2, 8)).astype(np.float32)
    options = {"axis": (1, 2), "feature_axis": -1} if name in ("layer_norm", "rms_norm") else {}
    whole = np.concatenate(list(x), axis=1)
    want = FAMILY[name](whole, **options)
    got = jax.vmap(lambda x: FAMILY[name](x, axis_name="d", **options), axis_name="d")(x)
    np.testing.assert_allclose(np.concatenate(list(got), axis=1), want, atol=1e-5)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 2e-5)])
@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance"])
def test_equals_pytorch(rng, x64, torch, name, dtype, tolerance):
    x, dy = rng.normal(1, 2, (2, 3, 6, 5, 4)).astype(dtype)  # (N, C, H, W), as PyTorch has it
    nn = torch.nn.functional
    features = (4,) if name in ("layer", "rms") else (6,)
    scale, bias = rng.normal(1, 0.5, (2, *features)).astype(dtype)
    ours, theirs = {
        "layer": (partial(layer_norm, epsilon=1e-5), lambda x, s, b: nn.layer_norm(x, (4,), s, b)),
        "rms": (
            lambda x, s, b: rms_norm(x, s, epsilon=1e-5) + b.reshape(1, 1, 1, 4),
            lambda x, s, b: nn.rms_norm(x, (4,), s, eps=1e-5) + b,
        ),
        "group": (
            partial(group_norm, num_groups=3, feature_axis=1, epsilon=1e-5),
            lambda x, s, b: nn.group_norm(x, 3, s, b),
        ),
        "instance": (
            partial(instance_norm, feature_axis=1, epsilon=1e-5),
            lambda x, s, b: nn.instance_norm(x, weight=s, bias=b),
        ),
    }[name]
    y, pullback = jax.vjp(ours, x, scale, bias)
    leaves = [torch.tensor(v, requires_grad=True) for v in (x, scale, bias)]
    ty = theirs(*leaves)
    ty.backward(torch.tensor(dy))
    want = [ty.detach(), *(leaf.grad for leaf in leaves)]
    for g, w in zip((y, *pullback(dy)), want, strict=True):
        np.testing.assert_allclose(g, w.numpy(), rtol=tolerance, atol=tolerance * 10)
