"""Folded variables: accuracy, number, stacking, and shapes in place of arrays."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from normjax import surgery
from tests.test_surgery_fold import NORMS, check, randomized

EPS = np.finfo(np.float32).eps
X = np.random.default_rng(3).normal(size=(4, 6, 6, 3)).astype(np.float32)
norm = partial(nn.BatchNorm, use_running_average=True)


class Preprocess(nn.Module):
    kind: type
    layer: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="layer")(x) if self.layer else x
        return self.kind(use_running_average=True, name="norm")(x)


def trained_on(z):
    """Variables of a norm that fits these values, in float32."""
    stats = {"mean": z.mean(0), "var": z.var(0)}
    affine = {"scale": np.linspace(0.5, 2, z.shape[1]), "bias": np.linspace(-1, 1, z.shape[1])}
    return tuple({k: v.astype(np.float32) for k, v in tree.items()} for tree in (affine, stats))


def oracle(z, affine, stats, epsilon=1e-5):
    """The norm in float64, and its slope."""
    mean, var, scale, bias = (
        np.float64(v) for v in (stats["mean"], stats["var"], affine["scale"], affine["bias"])
    )
    slope = scale / np.sqrt(var + epsilon)
    return (z - mean) * slope + bias, slope


@pytest.mark.parametrize("order", ["x - mean", "mean - x"])
@pytest.mark.parametrize("norm", NORMS)
def test_fold_edge_norm_of_raw_data(norm, order, rng):
    """1e5 +- 1: scaling an input before the mean is subtracted causes an error of 4e-3."""
    x = (1e5 + rng.normal(size=(64, 4))).astype(np.float32)
    affine, stats = trained_on(np.float64(x))
    variables = {"params": {"norm": affine}, "batch_stats": {"norm": stats}}
    want, _ = oracle(np.float64(x), affine, stats)
    model = Preprocess(NORMS[norm], layer=False)

    def call(variables, x):
        if order == "x - mean":
            return model.apply(variables, x)
        s = {k: v for tree in variables.values() for k, v in tree["norm"].items()}
        slope = s["scale"] / jnp.sqrt(s["var"] + jnp.float32(1e-5))
        return -(s["mean"][None] - x) * slope[None] + s["bias"][None]

    serve, folded, report = surgery.fold(call, variables, x)
    assert [reason for _, reason in report.alone] == ["it comes first"]
    # Difference, slope (four roundings), product and sum.
    np.testing.assert_allclose(
        jax.jit(serve)(folded, x), want, rtol=0, atol=8 * EPS * (np.abs(want).max() + 1)
    )


def test_a_second_norm_of_raw_data_also_subtracts_first(rng):
    x = (1e5 + rng.normal(size=(32, 4))).astype(np.float32)
    one = np.ones(4, np.float32)
    variables = {"mean": x.mean(0), "one": one, "half": one / 2}

    def call(v, x):
        # Scales of powers of two are exact, and so is every difference.
        x = x * v["one"][None] + v["one"][None]
        return (x * v["half"][None] - v["mean"][None] / 2) / jnp.sqrt(v["half"] / 2)[None]

    serve, folded, _ = surgery.fold(call, variables, x)
    want = np.float64(x) + 1 - np.float64(variables["mean"])
    # The sum x + 1 is rounded, half a step of float32 at 1e5.
    np.testing.assert_allclose(serve(folded, x), want, atol=1e5 * EPS / 2 + 1e-6)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_fold_guarantee_same_output_of_large_inputs(offset, rng):
    """Applies the kernel and the bias in float64; errors are within the bound of the docstring."""
    x = (offset + rng.normal(size=(32, 16))).astype(np.float32)
    layer = {"kernel": rng.normal(size=(16, 5)), "bias": rng.normal(size=5)}
    layer = {name: value.astype(np.float32) for name, value in layer.items()}
    kernel, bias = (np.float64(layer[name]) for name in ("kernel", "bias"))
    z = np.float64(x) @ kernel + bias
    affine, stats = trained_on(z)
    variables = {"params": {"layer": layer, "norm": affine}, "batch_stats": {"norm": stats}}
    want, slope = oracle(z, affine, stats)
    model = Preprocess(nn.BatchNorm, layer=True)
    _, folded, report = surgery.fold(model.apply, variables, x)
    assert len(report.folded) == 1
    new_kernel, new_bias = sorted((np.float64(a) for a in folded), key=np.size)[::-1]
    got = np.float64(x) @ new_kernel + new_bias
    size = np.abs(np.float64(x)) @ np.abs(kernel) + np.abs(bias) + np.abs(stats["mean"])
    bound = 4 * EPS * (slope * size + np.abs(affine["bias"]))
    assert (np.abs(got - want) <= bound).all()
    assert np.abs(got - want).max() > bound.max() / 1000, "the bound is too loose"


class Scaled(nn.Module):
    """A block with a layer scale, as in ConvNeXt and DINOv2, with batch norm or without."""

    with_norm: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(3, (3, 3), name="conv")(x)
        y = norm(name="norm")(y) if self.with_norm else nn.LayerNorm(name="norm")(y)
        y = nn.Dense(3, name="out")(nn.gelu(y))
        return x + y * self.param("gamma", nn.initializers.constant(0.1), (3,))[None, None, None]


def test_fold_edge_layer_scale():
    for with_norm in (True, False):
        model = Scaled(with_norm)
        variables = randomized(model, X)
        serve, folded, report = surgery.fold(model.apply, variables, X)
        assert report.folded == [("Scaled/conv", "Scaled/norm")][: int(with_norm)]
        assert report.scales == [("Scaled/out", "Scaled")]
        assert str(report).startswith(f"{int(with_norm)} of {int(with_norm)} norms folded")
        check(jax.jit(serve)(folded, X), jax.jit(model.apply)(variables, X))


@pytest.mark.usefixtures("lenient")
def test_a_square_is_not_a_deviation():
    variables = {"kernel": np.ones((3, 4), np.float32), "gain": np.full(4, 2, np.float32)}
    call = lambda v, x: x @ v["kernel"] * v["gain"] ** 2  # noqa: E731
    serve, folded, report = surgery.fold(call, variables, X)
    assert (report.folded, len(report.scales)) == ([], 1)
    check(jax.jit(serve)(folded, X), jax.jit(call)(variables, X))


class Passes(nn.Module):
    passes: int

    @nn.compact
    def __call__(self, x):
        conv, bn = nn.Conv(3, (3, 3)), norm()
        for _ in range(self.passes):
            x = nn.relu(bn(conv(x)))
        return x


def test_fold_edge_layer_and_norm_shared_by_passes():
    sizes = []
    for passes in (1, 3):
        model = Passes(passes)
        variables = randomized(model, X)
        serve, folded, report = surgery.fold(model.apply, variables, X)
        assert len(report.folded) == passes
        sizes.append([a.shape for a in folded])
        check(jax.jit(serve)(folded, X), jax.jit(model.apply)(variables, X))
    assert sizes[0] == sizes[1]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm()(nn.Conv(6, (3, 3), strides=2, feature_group_count=3)(x)))
        return norm()(nn.DenseGeneral((2, 3))(x.reshape((x.shape[0], -1))))


STACKED = {
    "one input": ((0, None), 0, X, lambda x, n: x[:n]),
    "one input for each": (0, 1, np.stack([X, 2 * X, 3 * X]), lambda x, n: x[:, :n]),
}


@pytest.mark.parametrize("name", STACKED)
def test_fold_edge_variables_stacked_for_vmap(name):
    in_axes, out_axes, x, batch = STACKED[name]
    members = [randomized(Net(), X) for _ in range(3)]
    variables = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    call = jax.vmap(Net().apply, in_axes, out_axes)
    serve, folded, report = surgery.fold(call, variables, x)
    assert (len(report.folded), report.alone) == (2, [])
    part = batch(x, 1)
    check(jax.jit(serve)(folded, part), jax.jit(call)(variables, part))


def test_ensembles_of_nn_vmap_are_folded():
    stack = nn.vmap(
        Net,
        variable_axes={"params": -1, "batch_stats": -1},
        split_rngs={"params": True},
        in_axes=None,
        out_axes=1,
        axis_size=2,
    )()
    variables = randomized(stack, X)
    serve, folded, report = surgery.fold(stack.apply, variables, X)
    assert (len(report.folded), report.alone) == (2, [])
    check(jax.jit(serve)(folded, X), jax.jit(stack.apply)(variables, X))


def test_fold_edge_shapes_in_place_of_arrays():
    """A server restores what another process has folded."""
    model = Passes(1)
    variables = randomized(model, X)
    shapes = jax.eval_shape(lambda: variables)
    serve, restored, report = surgery.fold(model.apply, shapes, X)
    _, folded, _ = surgery.fold(model.apply, variables, X)
    assert jax.eval_shape(lambda: folded) == restored
    assert len(report.folded) == 1
    check(jax.jit(serve)(folded, X), jax.jit(model.apply)(variables, X))


def test_members_are_folded_under_vmap():
    model = Passes(1)
    variables = jax.tree.map(lambda a: np.stack([a, 2 * a]), randomized(model, X))
    serve, _, _ = surgery.fold(model.apply, jax.tree.map(lambda a: a[0], variables), X)
    folded = jax.jit(jax.vmap(lambda v: surgery.fold(model.apply, v, X)[1]))(variables)
    want = jax.jit(jax.vmap(model.apply, (0, None)))(variables, X)
    check(jax.jit(jax.vmap(serve, (0, None)))(folded, X), want)


@pytest.mark.usefixtures("lenient")
def test_no_scale_is_folded_into_a_repeated_feature():
    """One feature spread over four: a scale of four cannot go into a kernel of one."""
    variables = {
        "kernel": np.ones((3, 1), np.float32),
        "var": np.linspace(1, 4, 4, dtype=np.float32),
    }

    def call(v, x):
        y = jax.lax.broadcast_in_dim(x @ v["kernel"], (len(x), 6, 6, 4), (0, 1, 2, 3))
        return y / jnp.sqrt(v["var"])

    serve, folded, report = surgery.fold(call, variables, X)
    assert len(report.alone) == 1
    check(jax.jit(serve)(folded, X), jax.jit(call)(variables, X))


def test_a_quotient_by_a_deviation_inside_a_scan_is_reported():
    def call(v, x):
        return jax.lax.scan(lambda x, s: (x / jnp.sqrt(s), None), x, v["var"])[0]

    _, _, report = surgery.fold(call, {"var": np.ones(2, np.float32)}, X)
    assert [reason for _, reason in report.alone] == ["a norm inside a scan is not folded"]


def test_nothing_to_fold_is_an_error():
    model = nn.Sequential([nn.Dense(4), normjax.linen.LayerNorm()])
    with pytest.raises(ValueError, match=r"surgery.fold: no norm found"):
        surgery.fold(model.apply, randomized(model, X), X)


def test_invalid_calls_and_arrays_are_errors():
    model = nn.Sequential([nn.Dense(4), norm()])
    variables = randomized(model, X)
    with pytest.raises(TypeError, match=r"surgery.fold: call is Sequential, .* Pass model.apply"):
        surgery.fold(model, variables, X)
    serve, _, _ = surgery.fold(model.apply, variables, X)
    for given, kind in ((variables, "dict"), (None, "NoneType")):
        with pytest.raises(
            ValueError, match=rf"folded is {kind}, expected 2 arrays. Pass the arrays"
        ):
            serve(given, X)


@pytest.mark.parametrize("given", [(), (False,)])
def test_fold_needs_a_bound_mode(given):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))

    x = jnp.ones((2, 3))
    variables = Net().init(jax.random.key(0), x, False)
    with pytest.raises(TypeError, match=r"surgery.fold: .*functools.partial\(model.apply, train=F"):
        surgery.fold(Net().apply, variables, x, *given)


@pytest.mark.usefixtures("lenient")
def test_norms_outside_of_modules_are_named_by_their_operation():
    variables = {"kernel": np.ones((2, 3, 4), np.float32), "var": np.ones((2, 4), np.float32)}

    def call(v, x):
        return x @ v["kernel"] / jnp.sqrt(v["var"])

    _, _, report = surgery.fold(jax.vmap(call, (0, None)), variables, X)
    assert report.folded == [("dot_general", "div")]
