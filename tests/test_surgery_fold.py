"""Folding: the same output without batch norm, wherever that is safe, and nowhere else."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import normjax.linen
from benchmarks import hlo
from normjax import surgery

KEY = jax.random.key(0)
X = np.random.default_rng(1).normal(1, 2, (4, 8, 8, 3)).astype(np.float32)
NORMS = {"flax": nn.BatchNorm, "normjax": normjax.linen.BatchNorm}


class Block(nn.Module):
    features: int
    norm: type
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, self.features, use_bias=False)
        norm = partial(self.norm, use_running_average=True)
        y = nn.relu(norm()(conv((3, 3), strides=self.stride)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class Residual(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        for features, stride in ((4, 1), (8, 2)):
            x = Block(features, self.norm, stride)(x)
        return nn.Dense(5)(x.max((1, 2)))


class Vgg(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        for features in (4, 6):
            x = self.norm(use_running_average=True)(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.Dense(7, use_bias=False)(x.reshape((x.shape[0], -1)))
        x = nn.swish(self.norm(use_running_average=True)(x))
        return nn.Dense(5)(x)


class Mixed(nn.Module):
    """Grouped, dilated, depthwise and transposed convolutions, and one layer used twice."""

    norm: type

    @nn.compact
    def __call__(self, x):
        norm = partial(self.norm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(6, (3, 3), feature_group_count=3)(x)))
        x = nn.relu(norm()(nn.Conv(8, (3, 3), kernel_dilation=2, padding="SAME")(x)))
        x = nn.relu(norm()(nn.Conv(8, (3, 3), feature_group_count=8, padding="VALID")(x)))
        x = nn.relu(norm()(nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)))
        x = nn.relu(norm()(nn.ConvTranspose(4, (2, 2), transpose_kernel=True)(x)))
        shared = nn.Conv(4, (3, 3))
        x = nn.relu(norm()(shared(x)))
        x = nn.relu(norm(use_scale=False)(shared(x)))
        return norm(use_bias=False)(nn.DenseGeneral((2, 3), axis=(1, 3))(x))


class Alone(nn.Module):
    """Norms that cannot be folded into a layer."""

    norm: type

    @nn.compact
    def __call__(self, x):
        norm = partial(self.norm, use_running_average=True)
        x = norm(name="first")(x)
        x = nn.relu(nn.Conv(4, (3, 3), name="padded")(x))
        x = norm(name="after_relu")(x)
        y = nn.Conv(4, (3, 3), name="twice")(x)
        return y + norm(name="of_two")(y)


NETS = {"residual": (Residual, 6), "vgg": (Vgg, 3), "mixed": (Mixed, 8)}


def randomized(model, x):
    """Random variables with which no norm is the identity."""
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        low, high = {"var": (0.2, 3), "scale": (0.5, 2)}.get(path[-1].key, (-1, 1))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, KEY, x))


def folded(model, x=X):
    variables = randomized(model, x)
    serve, arrays, report = surgery.fold(model.apply, variables, x)
    return jax.jit(model.apply), variables, jax.jit(serve), arrays, report


def check(got, want, rtol=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


def primitives(function, *args):
    """The names of all primitives; a division by a constant has a name of its own."""
    found = []

    def collect(jaxpr):
        for eqn in jaxpr.eqns:
            constant = isinstance(eqn.invars[-1], jax.extend.core.Literal)
            found.append(
                "div by a constant"
                if eqn.primitive.name == "div" and constant
                else eqn.primitive.name
            )
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    collect(inner.jaxpr)

    collect(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("net", NETS)
def test_fold_guarantee_same_output(net, norm):
    kind, count = NETS[net]
    model = kind(NORMS[norm])
    apply, variables, serve, arrays, report = folded(model)
    assert (len(report.folded), len(report.alone)) == (count, 0)
    check(serve(arrays, X), apply(variables, X))
    program = hlo.parse(serve.lower(arrays, X).compile().as_text())
    assert not [i for i in program if "sqrt" in i.opcode + i.op_name]
    names = primitives(serve, arrays, X)
    assert not {"rsqrt", "sqrt", "div", "pow", "integer_pow"} & set(names)
    layers = [n for n in names if n in ("conv_general_dilated", "dot_general")]
    # One addition for each layer and residual sum, and no other operation of a norm.
    assert names.count("add") <= len(layers) + (2 if net == "residual" else 0)
    assert names.count("mul") == (net == "vgg"), "only swish multiplies"
    assert "sub" not in names


def test_the_model_itself_has_the_operations_of_a_norm():
    model = Vgg(nn.BatchNorm)
    variables = randomized(model, X)
    assert {"rsqrt", "sub"} < set(primitives(model.apply, variables, X))


def test_fold_guarantee_no_norm_is_left():
    model = Alone(nn.BatchNorm)
    _, _, serve, arrays, _ = folded(model)
    names = primitives(serve, arrays, X)
    assert names.count("mul") == 3
    assert not {"sub", "rsqrt", "sqrt", "div"} & set(names)


@pytest.mark.parametrize("norm", NORMS)
def test_fold_guarantee_only_what_is_safe(norm):
    model = Alone(NORMS[norm])
    apply, variables, serve, arrays, report = folded(model)
    check(serve(arrays, X), apply(variables, X))
    assert not report.folded
    assert report.alone == [
        ("Alone/first", "it comes first"),
        ("Alone/after_relu", "max stands between it and any layer"),
        ("Alone/of_two", "the output of Alone/twice is used 2 times"),
    ]
    text = str(report)
    assert text.startswith("0 of 3 norms folded")
    assert all(name in text for name, _ in report.alone)


def affine(v, x, view=lambda a: a):
    mean, var, scale, bias = (view(v[name]) for name in ("mean", "var", "scale", "bias"))
    return (x - mean) * (scale / jnp.sqrt(var + jnp.float32(1e-5))) + bias


def plain(shape, features, *, at=-1):
    """Variables of a kernel and a norm, with features along axis `at` of the layer's output."""
    rng = np.random.default_rng(3)
    draw = {"mean": (-1, 1), "bias": (-1, 1), "scale": (0.5, 2), "var": (0.2, 3)}
    norm = {k: rng.uniform(*r, features).astype(np.float32) for k, r in draw.items()}
    return {"kernel": rng.normal(size=shape).astype(np.float32), **norm}


CALLS = {
    "features first": (
        lambda v, x: affine(
            v,
            lax.conv_general_dilated(jnp.transpose(x, (0, 3, 1, 2)), v["kernel"], (1, 1), "SAME"),
            lambda a: a[:, None, None],
        ),
        plain((5, 3, 3, 3), 5),
    ),
    "kernel on the left": (
        lambda v, x: affine(
            v, jnp.tensordot(v["kernel"], x, ((1,), (3,))), lambda a: a[:, None, None, None]
        ),
        plain((5, 3), 5),
    ),
    "kernel on the left, reshaped": (
        lambda v, x: affine(
            v,
            jnp.tensordot(v["kernel"], x, ((1,), (3,))).reshape(5, -1),
            lambda a: a[:, None],
        ),
        plain((5, 3), 5),
    ),
    "batch of products": (
        lambda v, x: affine(v, jnp.einsum("nhwc,hcd->nhwd", x, v["kernel"])),
        plain((8, 3, 4), 4),
    ),
    "reshaped before the norm": (
        lambda v, x: affine(v, (x.reshape(-1, 3) @ v["kernel"]).reshape(x.shape[0], 64, 4)),
        plain((3, 4), 4),
    ),
    "over two axes": (
        lambda v, x: affine(v, jnp.einsum("nhwc,chd->nwhd", x, v["kernel"])),
        plain((3, 8, 4), (8, 4)),
    ),
    "transposed before the norm": (
        lambda v, x: affine(v, jnp.swapaxes(x @ v["kernel"], 1, 2)),
        plain((3, 4), 4),
    ),
    "in remat and jit": (
        jax.remat(jax.jit(lambda v, x: affine(v, jax.jit(jnp.matmul)(x, v["kernel"])))),
        plain((3, 4), 4),
    ),
    "as a quotient": (
        lambda v, x: (x @ v["kernel"] - v["mean"]) / jnp.sqrt(v["var"]) * v["scale"] / 3,
        plain((3, 4), 4),
    ),
    "two norms": (
        lambda v, x: affine(v, -affine(v, 2 - x @ v["kernel"])),
        plain((3, 4), 4),
    ),
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", CALLS)
def test_layouts(name):
    call, variables = CALLS[name]
    serve, arrays, report = surgery.fold(call, variables, X)
    assert report.folded
    assert not report.alone
    check(serve(arrays, X), call(variables, X))
    check(serve(arrays, X[:1]), call(variables, X[:1]))


def positions(a):
    return a * jnp.arange(1.0, 9)[:, None]


UNSAFE = {
    "a scale for each position": lambda v, x: affine(v, x @ v["kernel"], positions),
    "a kernel that depends on the input": lambda v, x: affine(v, x @ (v["kernel"] * x.max())),
    "a kernel repeated for each example": lambda v, x: affine(
        v, jnp.einsum("nhwc,ncd->nhwd", x, jnp.broadcast_to(v["kernel"], (len(x), 3, 4)))
    ),
    "a flattened output": lambda v, x: affine(
        v, (x @ v["kernel"]).reshape(x.shape[0], -1), lambda a: jnp.concatenate([a] * 64)
    ),
    "a quotient by the output": lambda v, x: affine(v, 1 / (9 + x @ v["kernel"])),
    "the norm before the layer": lambda v, x: affine(v, x, lambda a: a[:3]) @ v["kernel"],
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_calls_are_not_folded(name):
    variables = plain((3, 4), 4)
    call = UNSAFE[name]
    serve, arrays, report = surgery.fold(call, variables, X)
    assert len(report.alone) == 1
    assert not report.folded
    for batch in (X, X[:1]):
        check(serve(arrays, batch), call(variables, batch))


def test_fold_guarantee_any_batch():
    model = Mixed(normjax.linen.BatchNorm)
    apply, variables, serve, arrays, _ = folded(model)
    _, _, _, of_one, _ = folded(model, X[:1])
    assert [a.shape for a in arrays] == [a.shape for a in of_one]
    for batch in (X[:1], X[:3]):
        check(serve(arrays, batch), apply(variables, batch))


def test_the_folded_function_is_exported_for_any_batch():
    model = Vgg(nn.BatchNorm)
    apply, variables, serve, arrays, _ = folded(model)
    x = jax.ShapeDtypeStruct(export.symbolic_shape("n, 8, 8, 3"), np.float32)
    exported = export.export(serve)(arrays, x)
    check(exported.call(arrays, X[:3]), apply(variables, X[:3]))


class One(nn.Module):
    layer: nn.Module
    before: object = staticmethod(lambda x: x)
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        return self.norm(use_running_average=True)(self.before(self.layer(x)))


def test_fold_edge_layer_without_bias():
    with_bias, without = (
        folded(One(nn.Conv(4, (3, 3), use_bias=b)))[3] for b in (True, False)
    )  # fmt: skip
    assert [a.shape for a in with_bias] == [a.shape for a in without]
    assert sorted(a.ndim for a in without) == [4, 4]


def test_fold_edge_norm_after_an_activation():
    _, _, serve, arrays, report = folded(One(nn.Conv(4, (3, 3)), nn.tanh))
    assert report.alone == [("One/BatchNorm_0", "tanh stands between it and any layer")]
    names = primitives(serve, arrays, X)
    assert (names.count("mul"), names.count("sub")) == (1, 0)


def test_fold_edge_shared_layer():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Conv(3, (3, 3), name="shared")
            for _ in range(2):
                x = nn.relu(nn.BatchNorm(use_running_average=True)(shared(x)))
            return x

    apply, variables, serve, arrays, report = folded(Twice())
    assert [layer for layer, _ in report.folded] == ["Twice/shared"] * 2
    assert sum(a.shape == (3, 3, 3, 3) for a in arrays) == 2
    check(serve(arrays, X), apply(variables, X))


@pytest.mark.usefixtures("lenient")
def test_a_variable_that_is_used_twice_is_stored_once():
    def call(v, x):
        return affine(v, jnp.tanh(jnp.tanh(x @ v["kernel"]) @ v["kernel"]))

    _, arrays, _ = surgery.fold(call, plain((3, 3), 3), X)
    assert sorted(a.size for a in arrays) == [3, 3, 3, 9]  # offset, scale, shift, kernel


def test_fold_edge_half_precision():
    model = One(nn.Conv(8, (3, 3), dtype=jnp.bfloat16), norm=normjax.linen.BatchNorm)
    apply, variables, serve, arrays, report = folded(model)
    assert len(report.folded) == 1
    assert sorted(str(a.dtype) for a in arrays) == ["bfloat16", "float32"]
    want = One(nn.Conv(8, (3, 3)), norm=normjax.linen.BatchNorm).apply(variables, X)
    got = serve(arrays, X)
    assert got.dtype == apply(variables, X).dtype
    # The input and the product are rounded once, the kernel twice; eps = 2^-8.
    check(got, want, rtol=4 * 2**-8)


def test_a_shift_is_added_in_float32_to_half_precision():
    """Ones and powers of two are exact in bfloat16, a third is not."""
    model = One(nn.Dense(1, use_bias=False, dtype=jnp.bfloat16), norm=normjax.linen.BatchNorm)
    one = np.ones(1, np.float32)
    variables = {
        "params": {
            "layer": {"kernel": np.ones((1, 1), np.float32)},
            "BatchNorm_0": {"scale": one, "bias": one / 3},
        },
        "batch_stats": {"BatchNorm_0": {"mean": 0 * one, "var": one - np.float32(1e-5)}},
    }
    x = np.array([[1.0], [64.0]], np.float32)
    serve, arrays, _ = surgery.fold(model.apply, variables, x)
    np.testing.assert_allclose(serve(arrays, x), x + np.float32(1 / 3), rtol=1e-6)


def test_fold_edge_norm_inside_a_scan():
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(block, x, _):
                return block(x), None

            loop = nn.scan(
                body,
                variable_broadcast=("params", "batch_stats"),
                length=2,
                split_rngs={"params": False},
            )
            return loop(One(nn.Dense(3)), x, None)[0]

    apply, variables, serve, arrays, report = folded(Loop())
    assert [reason for _, reason in report.alone] == ["a norm inside a scan is not folded"]
    check(serve(arrays, X), apply(variables, X))


class Queries(nn.Module):
    """Learned queries, repeated for each example, plus features of the example."""

    @nn.compact
    def __call__(self, x):
        queries = self.param("queries", nn.initializers.normal(), (1, 5, 4))
        queries = nn.Dense(4)(jnp.broadcast_to(queries, (x.shape[0], 5, 4)))
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
        return queries + x.max((1, 2))[:, None]


def test_fold_edge_variables_repeated_for_each_example():
    apply, variables, serve, arrays, report = folded(Queries())
    assert len(report.folded) == 1
    for batch in (X, X[:1]):
        check(serve(arrays, batch), apply(variables, batch))
    apply, variables, serve, arrays, _ = folded(Queries(), X[:1])
    check(serve(arrays, X[:1]), apply(variables, X[:1]))
    with pytest.raises(
        ValueError, match="computed beforehand, .* fold it with two examples or more"
    ):
        serve(arrays, X)


def test_prints_are_kept(capfd):
    class Printing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
            jax.debug.print("largest {} {}", x.max(), self.param("own", nn.initializers.ones, ()))
            return x

    _, _, serve, arrays, _ = folded(Printing())
    jax.block_until_ready(serve(arrays, X))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("largest") == 1


def test_weights_are_normalized_in_advance():
    model = One(normjax.linen.WeightNorm(nn.Dense(4)))
    apply, variables, serve, arrays, report = folded(model)
    assert len(report.folded) == 1
    assert "rsqrt" not in primitives(serve, arrays, X)
    check(serve(arrays, X), apply(variables, X))


def test_other_norms_and_integers_pass_through():
    class TokenModel(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(9, 6)(tokens) + self.param("place", nn.initializers.normal(), (1, 5, 6))
            x = x + nn.Dense(6)(nn.LayerNorm()(x))
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
            carry = jnp.zeros((tokens.shape[0], 4), x.dtype)
            return nn.RNN(nn.SimpleCell(4))(x, initial_carry=carry)

    tokens = np.arange(15).reshape(3, 5) % 9
    apply, variables, serve, arrays, report = folded(TokenModel(), tokens)
    assert (len(report.folded), len(report.alone)) == (1, 0)
    for batch in (tokens, tokens[:1]):
        check(serve(arrays, batch), apply(variables, batch))


def test_gradients_of_the_folded_function():
    model = Vgg(nn.BatchNorm)
    apply, variables, serve, arrays, _ = folded(model)
    want = jax.grad(lambda x: apply(variables, x).sum())(X)
    check(jax.grad(lambda x: serve(arrays, x).sum())(X), want)


def test_fold_does_not_change_variables():
    model = Vgg(nn.BatchNorm)
    variables = randomized(model, X)
    before = jax.tree.map(np.copy, variables)
    surgery.fold(model.apply, variables, X)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_a_call_that_trains_is_an_error():
    model = normjax.linen.BatchNorm()
    variables = model.init(jax.random.key(0), X, train=False)
    call = partial(model.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"surgery.fold: no norm found .* pass train=False"):
        surgery.fold(call, variables, X)


def test_arrays_of_another_model_are_an_error():
    _, _, serve, arrays, _ = folded(Vgg(nn.BatchNorm))
    with pytest.raises(
        ValueError, match=r"folded holds 2 arrays, expected \d+ arrays. Pass the arrays"
    ):
        serve(arrays[:2], X)
    with pytest.raises(ValueError, match=r"folded holds shape .* where the call .* needs"):
        serve(arrays[::-1], X)
