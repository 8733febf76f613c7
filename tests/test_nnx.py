"""Modules of NNX: setting the mode, frozen layers, and error messages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax.nnx
from normjax.nnx import BatchNorm
from tests import reference
from tests.reference import EPS

pytestmark = pytest.mark.usefixtures("lenient")
close = partial(np.testing.assert_allclose, atol=64 * EPS["float32"])


class Net(nnx.Module):
    """A layer within a model, called without a mode, as models are written in NNX."""

    def __init__(self, **options):
        self.norm = BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0), **options)

    def __call__(self, x, **mode):
        return self.norm(x, **mode)


@pytest.fixture
def x(rng):
    return rng.normal(3, 2, (8, 3)).astype(np.float32)


def set_at_construction(average):
    return Net(use_running_average=average)


def set_by_model_train_or_eval(average):
    net = Net(use_running_average=not average)
    (net.eval if average else net.train)()
    return net


def set_by_set_attributes(average):
    net = Net(use_running_average=None)
    net.set_attributes(use_running_average=average)
    return net


def set_by_view(average):
    return nnx.view(Net(use_running_average=None), use_running_average=average)


def given_at_the_call_by_flax_name(average):
    return partial(Net(use_running_average=not average), use_running_average=average)


def given_at_the_call_as_train(average):
    return partial(Net(use_running_average=not average), train=not average)


MODES = [
    set_at_construction,
    set_by_model_train_or_eval,
    set_by_set_attributes,
    set_by_view,
    given_at_the_call_by_flax_name,
    given_at_the_call_as_train,
]


def layer_of(net):
    return getattr(net, "func", net).norm


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("made", MODES, ids=lambda made: made.__name__)
def test_mode_selects_the_statistics(x, made, average):
    """Training normalizes by the batch and updates the statistics, evaluation does neither."""
    net = made(average)
    layer = layer_of(net)
    layer.mean[...] = jnp.array([1.0, 2, 3])
    y = net(x)
    want = reference.batch_norm(x, axes=(0,))
    if average:
        close(y, (x - np.array([1.0, 2, 3])) / np.sqrt(1 + 1e-5))
        np.testing.assert_array_equal(layer.mean[...], [1, 2, 3])
        np.testing.assert_array_equal(layer.var[...], np.ones(3))
    else:
        close(y, want.y)
        close(layer.mean[...], reference.running(np.array([1.0, 2, 3]), want.mean, 0.9))
        close(layer.var[...], reference.running(1.0, want.var, 0.9))


def test_a_new_layer_trains(x):
    assert BatchNorm(3, rngs=nnx.Rngs(0)).use_running_average is False
    close(Net()(x), reference.batch_norm(x, axes=(0,)).y)


def test_a_view_shares_its_statistics_with_the_model(x):
    net = Net()
    served = nnx.view(net, use_running_average=True)
    net(x)
    assert net.norm.use_running_average is False
    want = (x - net.norm.mean[...]) / np.sqrt(net.norm.var[...] + 1e-5)
    close(served(x), want)


def test_a_view_may_accumulate(x):
    net = Net(accumulate=False)
    normjax.nnx.empty_batch_moments(net)
    nnx.view(net, accumulate=True)(x)
    assert net.norm.accumulate is False
    close(net.norm.moments.get_value().mean, x.mean(0))
    np.testing.assert_array_equal(net.norm.mean[...], np.zeros(3))


def frozen_step(net, x, dy):
    """y, gradients of the model and of x, and the layer after a step."""

    @nnx.jit
    def step(net, x):
        def loss(net, x):
            y = net(x)
            return jnp.sum(dy * y), y

        return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(net, x)

    (_, y), (dnet, dx) = step(net, x)
    return y, dnet["norm"], dx


@pytest.mark.parametrize("before", ["model.train()", "model.eval()", "nothing"])
def test_a_frozen_layer_stays_frozen(rng, x, before):
    """It uses running statistics and does not update them, and its parameters have no gradient."""
    net = Net(frozen=True)
    net.norm.mean[...] = jnp.array([1.0, 2, 3])
    net.norm.scale[...] = jnp.array([1.0, 2, 0.5])
    {"model.train()": net.train, "model.eval()": net.eval, "nothing": lambda: None}[before]()
    dy = rng.normal(size=x.shape).astype(np.float32)
    y, dnorm, dx = frozen_step(net, x, dy)
    factor = np.array([1.0, 2, 0.5]) / np.sqrt(1 + 1e-5)
    close(y, (x - np.array([1.0, 2, 3])) * factor)
    close(dx, dy * factor)
    np.testing.assert_array_equal(net.norm.mean[...], [1, 2, 3])
    np.testing.assert_array_equal(net.norm.var[...], np.ones(3))
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(dnorm[name][...], np.zeros(3))


def test_a_layer_that_is_not_frozen_learns(rng, x):
    net = Net()
    dy = rng.normal(size=x.shape).astype(np.float32)
    _, dnorm, dx = frozen_step(net, x, dy)
    want = reference.batch_norm(x, dy=dy, axes=(0,))
    close(dnorm["scale"][...], want.dscale)
    close(dnorm["bias"][...], want.dbias)
    close(dx, want.dx)


def test_a_layer_may_be_frozen_and_unfrozen_later(x):
    net = Net()
    net.set_attributes(frozen=True)
    net(x)
    np.testing.assert_array_equal(net.norm.mean[...], np.zeros(3))
    net.set_attributes(frozen=False)
    net(x)
    close(net.norm.mean[...], 0.1 * x.mean(0))


def test_a_frozen_layer_accepts_evaluation_mode(x):
    net = Net(frozen=True)
    for mode in ({"train": False}, {"use_running_average": True}):
        close(net(x, **mode), x / np.sqrt(1 + 1e-5))


ABSTRACT = "ShapeDtypeStruct, expected an array: the restored state does not contain it. "
BOTH = "Restore both nnx.Param and nnx.BatchStat."


def rngs():
    return nnx.Rngs(0)


def linear():
    return nnx.Linear(3, 4, rngs=rngs())


def restored_without(left_out, make):
    """A module whose state came from a checkpoint that lacks variables of a type."""
    module = nnx.eval_shape(make)
    nnx.update(module, nnx.state(make(), nnx.Not(left_out)))
    return module


def changed(kind, **options):
    wrapper = kind(linear(), **options, rngs=rngs())
    wrapper.layer_instance = nnx.Sequential(linear())
    return wrapper


ONE = jnp.ones((4, 3))


def uncounted():
    layer = BatchNorm(3, rngs=rngs())
    layer.set_attributes(momentum=None)
    return layer


ERRORS = {
    "momentum=None without the variable count": (
        lambda: uncounted()(ONE),
        ValueError,
        "normjax.nnx.BatchNorm: momentum=None, debias=True and schedules need the variable count, "
        "which the layer does not have. Build the layer with these arguments.",
    ),
    "a key in place of rngs": (
        lambda: BatchNorm(3, rngs=jax.random.key(0)),
        TypeError,
        "normjax.nnx.BatchNorm: rngs is PRNGKeyArray, expected nnx.Rngs. Pass rngs=nnx.Rngs(0), "
        "or nnx.Rngs(key).",
    ),
    "affine of PyTorch": (
        lambda: BatchNorm(3, affine=False, rngs=rngs()),
        TypeError,
        "normjax.nnx.BatchNorm: got affine=False, an argument of PyTorch; scale and bias have a "
        "switch each. Pass use_scale= and use_bias=.",
    ),
    "accumulate=True in a view without moments": (
        lambda: nnx.view(BatchNorm(3, rngs=rngs()), accumulate=True),
        ValueError,
        "normjax.nnx.BatchNorm: accumulate=True in a view of a layer without the variable moments, "
        "expected a layer that has it, since a view cannot add it. Build the layer with "
        "accumulate=True, or call normjax.nnx.empty_batch_moments(model) before.",
    ),
    "no mode": (
        lambda: BatchNorm(3, use_running_average=None, rngs=rngs())(ONE),
        ValueError,
        "normjax.nnx.BatchNorm: no mode was given. No `use_running_average` argument was provided "
        "to BatchNorm. Expected one: call model.train() or model.eval(), pass train=True or "
        "train=False at the call, or set use_running_average at construction or by nnx.view.",
    ),
    "two modes": (
        lambda: BatchNorm(3, rngs=rngs())(ONE, True, train=True),
        ValueError,
        "normjax.nnx.BatchNorm: Got train (at call) = True and use_running_average (at call) = "
        "True, which are one switch (train = not use_running_average), expected it once. Give one "
        "of them. A mode passed by position is use_running_average, as in Flax, the opposite of "
        "train: name it, train=... or use_running_average=...",
    ),
    "frozen, train=True": (
        lambda: BatchNorm(3, frozen=True, rngs=rngs())(ONE, train=True),
        ValueError,
        "normjax.nnx.BatchNorm: train=True asks a frozen layer to train. Leave the mode out at the "
        "call, or unfreeze the layer: model.set_attributes(frozen=False).",
    ),
    "frozen, use_running_average=False": (
        lambda: BatchNorm(3, frozen=True, rngs=rngs())(ONE, False),
        ValueError,
        "normjax.nnx.BatchNorm: use_running_average=False asks a frozen layer to train. Leave the "
        "mode out at the call, or unfreeze the layer: model.set_attributes(frozen=False).",
    ),
    "an ambiguous mask": (
        lambda: BatchNorm(4, rngs=rngs())(jnp.ones((4, 4)), mask=np.ones(4, bool)),
        ValueError,
        "normjax.nnx.BatchNorm: mask has shape (4,), which has two readings for x with shape "
        "(4, 4): over the leading axes or over the trailing ones. Pass mask.reshape((4, 1)) for "
        "the first or mask.reshape((1, 4)) for the second.",
    ),
    "another number of features": (
        lambda: BatchNorm(4, rngs=rngs())(ONE),
        ValueError,
        "normjax.nnx.BatchNorm: x with shape (4, 3) has 3 features along axis=-1, expected "
        "num_features=4, the size of mean. If the features lie on another axis, pass axis=.",
    ),
    "another number of features on several axes": (
        lambda: BatchNorm(12, axis=(1, 2), rngs=rngs())(jnp.ones((2, 3, 5))),
        ValueError,
        "normjax.nnx.BatchNorm: x with shape (2, 3, 5) has 15 features along axis=(1, 2), expected "
        "num_features=12, the size of mean. If the features lie on another axis, pass axis=.",
    ),
    "another number of features, layer norm": (
        lambda: normjax.nnx.LayerNorm(4, rngs=rngs())(ONE),
        ValueError,
        "normjax.nnx.LayerNorm: x with shape (4, 3) has 3 features along feature_axes=-1, expected "
        "num_features=4, the size of scale. If the features lie on another axis, pass "
        "feature_axes=.",
    ),
    "another number of features, group norm": (
        lambda: normjax.nnx.GroupNorm(4, 2, rngs=rngs())(ONE),
        ValueError,
        "normjax.nnx.GroupNorm: x with shape (4, 3) has 3 features along feature_axis=-1, expected "
        "num_features=4, the size of scale. If the features lie on another axis, pass "
        "feature_axis=.",
    ),
    "an abstract model": (
        lambda: nnx.eval_shape(lambda: BatchNorm(3, rngs=rngs()))(ONE),
        ValueError,
        f"normjax.nnx.BatchNorm: mean is {ABSTRACT}{BOTH}",
    ),
    "statistics that were not restored": (
        lambda: restored_without(nnx.BatchStat, lambda: BatchNorm(3, rngs=rngs()))(ONE),
        ValueError,
        f"normjax.nnx.BatchNorm: mean is {ABSTRACT}{BOTH}",
    ),
    "parameters that were not restored": (
        lambda: restored_without(nnx.Param, lambda: BatchNorm(3, rngs=rngs()))(ONE),
        ValueError,
        f"normjax.nnx.BatchNorm: scale is {ABSTRACT}{BOTH}",
    ),
    "the state of a power iteration that was not restored": (
        lambda: restored_without(
            nnx.BatchStat, lambda: normjax.nnx.SpectralNorm(linear(), rngs=rngs())
        )(ONE),
        ValueError,
        f"normjax.nnx.SpectralNorm: kernel/u is {ABSTRACT}{BOTH}",
    ),
    "weights that were not restored": (
        lambda: nnx.eval_shape(lambda: normjax.nnx.WeightNorm(linear(), rngs=rngs()))(ONE),
        ValueError,
        f"normjax.nnx.WeightNorm: kernel is {ABSTRACT}{BOTH}",
    ),
    "epsilon of PyTorch": (
        lambda: BatchNorm(3, eps=1e-3, rngs=rngs()),
        TypeError,
        "normjax.nnx.BatchNorm: got eps=0.001, an argument of PyTorch; it is called epsilon, as in "
        "Flax. Pass epsilon=.",
    ),
    "features of PyTorch's group norm": (
        lambda: normjax.nnx.GroupNorm(num_groups=2, num_channels=4, rngs=rngs()),
        TypeError,
        "normjax.nnx.GroupNorm: got num_channels=4, an argument of PyTorch; it is called "
        "num_features. Pass num_features=.",
    ),
    "features of PyTorch's layer norm": (
        lambda: normjax.nnx.LayerNorm(normalized_shape=4, rngs=rngs()),
        TypeError,
        "normjax.nnx.LayerNorm: got normalized_shape=4, an argument of PyTorch; it is called "
        "num_features. Pass num_features=.",
    ),
    "groups that do not divide": (
        lambda: normjax.nnx.GroupNorm(6, 4, rngs=rngs()),
        ValueError,
        "normjax.nnx.GroupNorm: Number of groups (4) does not divide the number of channels (6). "
        "Expected num_groups to be one of [1, 2, 3, 6].",
    ),
    "a group size that does not divide": (
        lambda: normjax.nnx.GroupNorm(6, None, 4, rngs=rngs()),
        ValueError,
        "normjax.nnx.GroupNorm: Number of features (6) is not multiple of the group size (4). "
        "Expected group_size to be one of [1, 2, 3, 6].",
    ),
    "weight norm of a layer that changed": (
        lambda: changed(normjax.nnx.WeightNorm)(ONE),
        RuntimeError,
        "normjax.nnx.WeightNorm: the layer has the param ('layers', 0, 'kernel'), for which "
        "the wrapper has no variable, expected one of [('kernel',)]. "
        "Parameters of the layer_instance should "
        "not change! Wrap the layer when it is complete.",
    ),
    "spectral norm of a layer that changed": (
        lambda: changed(normjax.nnx.SpectralNorm)(ONE),
        RuntimeError,
        "normjax.nnx.SpectralNorm: the layer has the param ('layers', 0, 'kernel', 'u'), for which "
        "the wrapper has no variable, expected one of [('kernel', 'u'), ('kernel', 'sigma')]. "
        "Parameters of "
        "the layer_instance should not change! Wrap the layer when it is complete.",
    ),
    "a standardized layer that changed": (
        lambda: changed(normjax.nnx.WeightStandardized, use_gain=True)(ONE),
        RuntimeError,
        "normjax.nnx.WeightStandardized: the layer has the param ('layers', 0, 'kernel'), for "
        "which the wrapper has no variable, expected one of [('kernel',)]. "
        "Parameters of the layer_instance "
        "should not change! Wrap the layer when it is complete.",
    ),
    "a wrapper around an integer": (
        lambda: normjax.nnx.WeightNorm(3, rngs=rngs()),
        TypeError,
        "normjax.nnx.WeightNorm: layer_instance is int, expected an instance of a flax.nnx module. "
        "Pass the layer whose weights are normalized, for example nnx.Linear(4, 3, rngs=rngs).",
    ),
    "no accumulated moments": (
        lambda: normjax.nnx.move_batch_stats(BatchNorm(3, rngs=rngs())),
        ValueError,
        "normjax.nnx.move_batch_stats: no batch norm has kept moments, expected at least one that "
        "did. Run the model in training with accumulate=True: "
        "model.set_attributes(accumulate=True).",
    ),
    "moments of a model without a batch norm": (
        lambda: normjax.nnx.move_batch_stats(linear()),
        ValueError,
        "normjax.nnx.move_batch_stats: Linear has no batch norm of normjax.nnx, expected a module "
        "of flax.nnx that has at least one. Pass the whole model.",
    ),
    "empty moments of a dict": (
        lambda: normjax.nnx.empty_batch_moments({"mean": ONE}),
        ValueError,
        "normjax.nnx.empty_batch_moments: dict has no batch norm of normjax.nnx, expected a module "
        "of flax.nnx that has at least one. Pass the whole model.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_messages(name):
    call, kind, sentence = ERRORS[name]
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    assert str(error.value) == sentence


def test_a_layer_that_raises_under_weight_norm_keeps_its_weights():
    module = normjax.nnx.WeightNorm(linear(), rngs=rngs())
    before = np.asarray(module.layer_instance.kernel[...])
    with pytest.raises(TypeError, match="dot_general"):
        module(jnp.ones((2, 5)))
    np.testing.assert_array_equal(module.layer_instance.kernel[...], before)


def test_a_state_goes_through_split_and_merge_under_jit(x):
    """The functional form: state in, state out."""
    graph, state = nnx.split(Net())

    @jax.jit
    def step(state, x):
        net = nnx.merge(graph, state)
        y = net(x)
        return y, nnx.state(net)

    want = reference.batch_norm(x, axes=(0,))
    y, state = step(state, x)
    _, state = step(state, x)
    close(y, want.y)
    close(state["norm"]["mean"][...], reference.running(0.0, want.mean, 0.9, steps=2))
