"""The networks of docs/textbook against their PyTorch twins, in float64."""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax.linen
import normjax.nnx
from normjax import surgery

pytestmark = pytest.mark.usefixtures("x64")

# The fields that correspond to the defaults of PyTorch's batch norm.
FIELDS = {"momentum": 0.9, "epsilon": 1e-5, "ddof": 1}
DTYPE = jnp.float64
EPS = np.finfo(np.float64).eps


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def close(got, want, terms):
    """Equal up to rounding, relative to the largest value.

    Libraries add in different orders. A sum of n terms rounds by at most n eps / 2, and so does its
    derivative. `terms` is the longest sum times the number of layers that propagate an error,
    forward and backward. A norm less than doubles an error, since 1 + |mean| / deviation < 2 here.
    """
    np.testing.assert_allclose(got, want, rtol=0, atol=terms * EPS * np.abs(want).max())


# A network is a function of its layers, which may be of any of the libraries.


def linear_block(f, x):
    return f.relu(f.norm1(f.linear1(x)))


def conv_block(f, x):
    return f.relu(f.norm1(f.conv1(x)))


def post_activation(f, x):
    y = f.relu(f.norm1(f.conv1(x)))
    return f.relu(x + f.norm2(f.conv2(y)))


def post_activation_norm_after(f, x):
    y = f.norm1(f.relu(f.conv1(x)))
    return f.norm2(f.relu(x + f.conv2(y)))


def pre_activation(f, x):
    y = f.conv1(f.relu(f.norm1(x)))
    return x + f.conv2(f.relu(f.norm2(y)))


def pre_activation_norm_after(f, x):
    y = f.conv1(f.norm1(f.relu(x)))
    return x + f.conv2(f.norm2(f.relu(y)))


def cnn(f, x):
    for i in "123":
        x = getattr(f, f"norm{i}")(getattr(f, f"conv{i}")(x))
        x = f.max_pool(f.relu(x))
    return f.linear1(f.flatten(x))


class Network(NamedTuple):
    """A network, the sizes of its layers by name, and the shape of its input, channels last."""

    call: Any
    layers: dict[str, tuple[int, ...]]
    shape: tuple[int, ...]

    @property
    def rules(self):
        kinds = {"linear": "linear", "conv": "conv", "norm": "batch_norm"}
        return [(name, name, kinds[name[:-1]]) for name in self.layers]

    @property
    def terms(self):
        """The longest sum, over all examples and positions, for each layer and both passes."""
        return np.prod(self.shape[:-1]) * 2 * len(self.layers)

    def bound(self, layer, functions):
        """The layers that `layer` makes, and the functions between them."""
        made = {name: layer(name, sizes) for name, sizes in self.layers.items()}
        return SimpleNamespace(**made, **functions)


RESIDUAL = {"conv1": (4, 4), "norm1": (4,), "conv2": (4, 4), "norm2": (4,)}
NETWORKS = {
    "linear_block": Network(linear_block, {"linear1": (6, 4), "norm1": (4,)}, (16, 6)),
    "conv_block": Network(conv_block, {"conv1": (3, 4), "norm1": (4,)}, (4, 6, 5, 3)),
    **{
        order.__name__: Network(order, RESIDUAL, (4, 6, 5, 4))
        for order in (
            post_activation,
            post_activation_norm_after,
            pre_activation,
            pre_activation_norm_after,
        )
    },
    "cnn": Network(
        cnn,
        {
            "conv1": (3, 4),
            "norm1": (4,),
            "conv2": (4, 6),
            "norm2": (6,),
            "conv3": (6, 8),
            "norm3": (8,),
            "linear1": (4 * 4 * 8, 10),
        },
        (4, 32, 32, 3),
    ),
}
JAX = {
    "relu": jax.nn.relu,
    "max_pool": partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
    "flatten": lambda x: x.reshape(len(x), -1),
}


class Functions:
    """The functions of normjax, with the variables of linen."""

    def __init__(self, network, state, fields):
        self.network, self.fields = network, fields
        x = jax.ShapeDtypeStruct(network.shape, jnp.float64)
        model = Linen.Model(network, fields)
        shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
        variables = surgery.import_torch(shapes, state, network.rules)
        self.params, self.stats = variables["params"], variables["batch_stats"]

    def apply(self, params, stats, x, train):
        moved = {}

        def linear(name, x):
            y = x @ params[name]["kernel"]
            return y + params[name]["bias"][None] if "bias" in params[name] else y

        def conv(name, x):
            axes = ("NHWC", "HWIO", "NHWC")
            kernel = params[name]["kernel"]
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)

        def norm(name, x):
            running = normjax.BatchStats(**stats[name])
            y, running = normjax.batch_norm(x, running, **params[name], train=train, **self.fields)
            moved[name] = {"mean": running.mean, "var": running.var}
            return y

        kinds = {"linear": linear, "conv": conv, "norm": norm}
        f = self.network.bound(lambda name, _: partial(kinds[name[:-1]], name), JAX)
        return self.network.call(f, x), moved

    def state(self, params, stats):
        """As a state dict of PyTorch."""
        variables = {"params": params, "batch_stats": stats}
        return surgery.export_torch(variables, self.network.rules)


class Linen(Functions):
    """Modules of linen."""

    class Model(nn.Module):
        network: Network
        fields: dict[str, Any]

        @nn.compact
        def __call__(self, x, train):
            def layer(name, sizes):
                if name.startswith("linear"):
                    bias = name in last(self.network)
                    return nn.Dense(sizes[-1], bias, param_dtype=DTYPE, name=name)
                if name.startswith("conv"):
                    options = dict(use_bias=False, param_dtype=DTYPE)
                    return nn.Conv(sizes[-1], (3, 3), **options, name=name)
                norm = normjax.linen.BatchNorm(**self.fields, param_dtype=DTYPE, name=name)
                return partial(norm, train=train)

            return self.network.call(self.network.bound(layer, JAX), x)

    def apply(self, params, stats, x, train):
        variables = {"params": params, "batch_stats": stats}
        model = self.Model(self.network, self.fields)
        if not train:
            return model.apply(variables, x, train), stats
        y, updates = model.apply(variables, x, train, mutable=["batch_stats"])
        return y, updates["batch_stats"]


class NNX:
    """Modules of NNX."""

    class Model(nnx.Module):
        def __init__(self, network, fields, rngs):
            self.network = nnx.static(network)
            options = dict(param_dtype=DTYPE, rngs=rngs)
            for name, sizes in network.layers.items():
                if name.startswith("linear"):
                    layer = nnx.Linear(*sizes, use_bias=name in last(network), **options)
                elif name.startswith("conv"):
                    layer = nnx.Conv(*sizes, (3, 3), use_bias=False, **options)
                else:
                    layer = normjax.nnx.BatchNorm(*sizes, **fields, **options)
                setattr(self, name, layer)

        def __call__(self, x):
            f = self.network.bound(lambda name, _: getattr(self, name), JAX)
            return self.network.call(f, x)

    def __init__(self, network, state, fields):
        self.network = network
        model = nnx.eval_shape(lambda: self.Model(network, fields, nnx.Rngs(0)))
        model = surgery.import_torch(model, state, network.rules)
        self.graphdef, self.params, self.stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def apply(self, params, stats, x, train):
        # A copy: variables of an outer trace cannot be changed in an inner one.
        model = nnx.merge(self.graphdef, params, stats, copy=True)
        model.train() if train else model.eval()
        return model(x), nnx.state(model, nnx.BatchStat)

    def state(self, params, stats):
        """As a state dict of PyTorch."""
        return surgery.export_torch(nnx.merge(self.graphdef, params, stats), self.network.rules)


FORMS = {"functions": Functions, "linen": Linen, "nnx": NNX}
every_form = pytest.mark.parametrize("form", FORMS)


def last(network):
    """The linear layers that no norm follows. A norm would subtract their bias."""
    return [name for name in [*network.layers][-1:] if name.startswith("linear")]


def torch_twin(torch, network):
    """The network in PyTorch, with scales and biases other than 1 and 0."""

    def layer(name, sizes):
        if name.startswith("linear"):
            return torch.nn.Linear(*sizes, bias=name in last(network))
        if name.startswith("conv"):
            return torch.nn.Conv2d(*sizes, 3, padding=1, bias=False)
        return (torch.nn.BatchNorm1d if len(network.shape) == 2 else torch.nn.BatchNorm2d)(*sizes)

    functions = {
        "relu": torch.relu,
        "max_pool": partial(torch.nn.functional.max_pool2d, kernel_size=2),
        # The weight of the classifier is copied unchanged, so its input has the order of JAX.
        "flatten": lambda x: x.movedim(1, -1).flatten(1),
    }

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, sizes in network.layers.items():
                setattr(self, name, layer(name, sizes))

        def forward(self, x):
            return network.call(network.bound(lambda name, _: getattr(self, name), functions), x)

    torch.manual_seed(0)
    twin = Twin().double()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return twin


def first(x):
    return np.moveaxis(np.asarray(x), -1, 1).copy()


def run_torch(torch, network, batches, cotangents):
    """The initial state of the twin, the results of each step, and the final evaluation."""
    twin = torch_twin(torch, network).train()
    state = {name: tensor.numpy().copy() for name, tensor in twin.state_dict().items()}
    steps = []
    for x, dy in zip(batches, cotangents, strict=True):
        x = torch.from_numpy(first(x)).requires_grad_()
        y = twin(x)
        twin.zero_grad()
        y.backward(torch.from_numpy(first(dy)))
        gradients = {name: p.grad.numpy().copy() for name, p in twin.named_parameters()}
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.1 * parameter.grad
        moved = {name: tensor.numpy().copy() for name, tensor in twin.state_dict().items()}
        steps.append((y.detach().numpy(), x.grad.numpy(), gradients, moved))
    return state, steps, twin.eval()(torch.from_numpy(first(batches[0]))).detach().numpy()


def run_jax(form, batches, cotangents):
    """The same results of normjax, in the layout of PyTorch."""

    @jax.jit
    def step(params, stats, x, dy):
        def loss(params, x):
            y, moved = form.apply(params, stats, x, True)
            return (y * dy).sum(), (y, moved)

        (gradients, dx), (y, moved) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        return y, dx, gradients, params, moved

    params, stats, steps = form.params, form.stats, []
    for x, dy in zip(batches, cotangents, strict=True):
        y, dx, gradients, params, moved = step(params, stats, x, dy)
        scales = form.state(gradients, stats)
        steps.append((first(y), first(dx), scales, form.state(params, moved)))
        stats = moved
    y, same = jax.jit(partial(form.apply, train=False))(params, stats, batches[0])
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    return steps, first(y)


def compare(torch, network, form, fields, rng):
    batches = [rng.normal(1.0, 2.0, network.shape) for _ in range(2)]
    shape = jax.eval_shape(
        lambda x: network.call(network.bound(lambda _, sizes: shaped(sizes), JAX), x), batches[0]
    ).shape
    cotangents = [rng.normal(0.0, 1 / len(batches[0]), shape) for _ in range(2)]
    state, want, want_evaluated = run_torch(torch, network, batches, cotangents)
    got, got_evaluated = run_jax(FORMS[form](network, state, fields), batches, cotangents)
    terms = network.terms
    for k, (ours, twins) in enumerate(zip(got, want, strict=True), start=1):
        close(ours[0], twins[0], k * terms)
        close(ours[1], twins[1], k * terms)
        for name, gradient in twins[2].items():
            close(ours[2][name], gradient, k * terms)
        for name, array in twins[3].items():
            if not name.endswith("num_batches_tracked"):
                assert ours[3][name].dtype == np.float64
                close(ours[3][name], array, k * terms)
    close(got_evaluated, want_evaluated, 2 * terms)


def shaped(sizes):
    """A layer that does nothing but change the number of features."""
    return lambda x: jnp.zeros((*x.shape[:-1], sizes[-1]), x.dtype)


@every_form
@pytest.mark.parametrize("name", NETWORKS)
def test_two_steps_and_the_evaluation_of_a_network(torch, name, form, rng):
    """Outputs, gradients of x and of all parameters, parameters and running statistics."""
    compare(torch, NETWORKS[name], form, FIELDS, rng)


@every_form
@pytest.mark.parametrize(
    "fault", [{"epsilon": 1.001e-5}, {"momentum": 0.9001}, {"ddof": 0}], ids=str
)
def test_a_wrong_field_is_detected(torch, form, fault, rng):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(torch, NETWORKS["conv_block"], form, {**FIELDS, **fault}, rng)


# The four norms, and layer norm with one scale per channel, which is a group norm in PyTorch.
SHAPE = 4, 6, 5, 3  # channels first
GROUPS = 3


def four_norms(torch):
    channels, options = SHAPE[1], {"dtype": torch.float64}
    return {
        "batch": torch.nn.BatchNorm2d(channels, **options),
        "layer": torch.nn.LayerNorm(SHAPE[1:], **options),
        "layer_by_channel": torch.nn.GroupNorm(1, channels, **options),
        "instance": torch.nn.InstanceNorm2d(channels, affine=True, **options),
        "group": torch.nn.GroupNorm(GROUPS, channels, **options),
    }


def norm_of_functions(kind, channels):
    where = {"feature_axis": channels, "epsilon": 1e-5}
    return {
        "batch": lambda x, *affine: normjax.batch_norm(x, None, *affine, train=True, **where)[0],
        "layer": partial(normjax.layer_norm, axis=(1, 2, 3), epsilon=1e-5),
        "layer_by_channel": partial(normjax.layer_norm, axis=(1, 2, 3), **where),
        "instance": partial(normjax.instance_norm, **where),
        "group": partial(normjax.group_norm, num_groups=GROUPS, **where),
    }[kind]


def fields_of_modules(channels):
    whole, common = {"reduction_axes": (1, 2, 3)}, {"epsilon": 1e-5, "param_dtype": DTYPE}
    return {
        "batch": ("BatchNorm", common | {"axis": channels}),
        "layer": ("LayerNorm", common | whole | {"feature_axes": (1, 2, 3)}),
        "layer_by_channel": ("LayerNorm", common | whole | {"feature_axes": channels}),
        "instance": ("InstanceNorm", common | {"feature_axes": channels}),
        "group": ("GroupNorm", common | {"num_groups": GROUPS, "feature_axis": channels}),
    }


def norm_of_linen(kind, channels):
    name, fields = fields_of_modules(channels)[kind]
    layer = getattr(normjax.linen, name)(**fields)
    mode = {"use_running_average": False} if kind == "batch" else {}

    def norm(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}}
        if kind == "batch":
            variables["batch_stats"] = {"mean": jnp.zeros_like(bias), "var": jnp.ones_like(bias)}
        return layer.apply(variables, x, **mode, mutable=["batch_stats"])[0]

    return norm


def norm_of_nnx(kind, channels):
    name, fields = fields_of_modules(channels)[kind]

    def norm(x, scale, bias):
        layer = getattr(normjax.nnx, name)(scale.size, **fields, rngs=nnx.Rngs(0))
        # NNX flattens several feature axes.
        layer.scale[...], layer.bias[...] = scale.ravel(), bias.ravel()
        return layer(x)

    return norm


NORMS = {"functions": norm_of_functions, "linen": norm_of_linen, "nnx": norm_of_nnx}


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("channels", [-3, -1], ids=["first", "last"])
@pytest.mark.parametrize("kind", ["batch", "layer", "layer_by_channel", "instance", "group"])
def test_the_four_norms(torch, kind, channels, form, rng):
    """Outputs and the gradients of input, scale and bias, channels first and last."""
    layer = four_norms(torch)[kind].train()
    weight = rng.normal(1.0, 0.5, layer.weight.shape)
    bias = rng.normal(size=layer.bias.shape)
    layer.weight.data, layer.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
    x, dy = rng.normal(1.0, 2.0, SHAPE), rng.normal(size=SHAPE)
    x_torch = torch.from_numpy(x).requires_grad_()
    y = layer(x_torch)
    y.backward(torch.from_numpy(dy))
    want = y.detach(), x_torch.grad, layer.weight.grad, layer.bias.grad

    def ours(array):
        """Moves the channels to the tested axis."""
        return np.moveaxis(array, -3, channels) if array.ndim > 1 else np.asarray(array)

    y, pull = jax.vjp(NORMS[form](kind, channels), *map(jnp.asarray, map(ours, (x, weight, bias))))
    for got, twin in zip((y, *pull(jnp.asarray(ours(dy)))), want, strict=True):
        assert got.dtype == np.float64
        # One layer, both passes; layer norm sums over an example, and its parameters over examples.
        close(got, ours(twin.numpy()), 2 * np.prod(SHAPE))


def by_hand(x, dy, scale, bias, epsilon):
    """The formulas of docs/textbook/by_hand.md, for x of shape (m, features)."""
    m, mean = len(x), x.mean(0)
    var = ((x - mean) ** 2).mean(0)
    x_hat = (x - mean) / np.sqrt(var + epsilon)
    d_x_hat = dy * scale
    d_var = -0.5 * (var + epsilon) ** -1.5 * (d_x_hat * (x - mean)).sum(0)
    d_mean = -((var + epsilon) ** -0.5) * d_x_hat.sum(0)
    dx = (var + epsilon) ** -0.5 * d_x_hat + 2 / m * (x - mean) * d_var + d_mean / m
    running = 0.1 * mean, 0.9 + 0.1 * x.var(0, ddof=1)
    return scale * x_hat + bias, dx, (dy * x_hat).sum(0), dy.sum(0), *running


def test_batch_norm_by_hand(torch, rng):
    x, dy = rng.normal(1.0, 2.0, (16, 3)), rng.normal(size=(16, 3))
    scale, bias = rng.normal(1.0, 0.5, 3), rng.normal(size=3)
    want = by_hand(x, dy, scale, bias, 1e-5)

    layer = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    layer.weight.data, layer.bias.data = torch.from_numpy(scale), torch.from_numpy(bias)
    x_torch = torch.from_numpy(x).requires_grad_()
    y = layer(x_torch)
    y.backward(torch.from_numpy(dy))
    gradients = x_torch.grad, layer.weight.grad, layer.bias.grad
    of_torch = y.detach(), *gradients, layer.running_mean, layer.running_var

    def norm(x, scale, bias):
        stats = normjax.BatchStats.make(3, jnp.float64)
        return normjax.batch_norm(x, stats, scale, bias, train=True, **FIELDS)

    y, pull, moved = jax.vjp(norm, *map(jnp.asarray, (x, scale, bias)), has_aux=True)
    of_jax = y, *pull(jnp.asarray(dy)), moved.mean, moved.var
    for hand, twin, ours in zip(want, of_torch, of_jax, strict=True):
        close(twin.numpy(), hand, 2 * len(x))
        close(ours, hand, 2 * len(x))
