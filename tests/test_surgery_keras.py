"""Weights of Keras: import, export, and equal outputs of the twin."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from normjax import surgery

KEY = jax.random.key(0)
NAMES = [
    ("Conv_0", "net/conv0", "conv"),
    ("Conv_1", "net/depthwise", "depthwise_conv"),
    ("ConvTranspose_0", "net/up", "conv_transpose"),
    ("Dense_0", "net/dense", "dense"),
    ("BatchNorm_0", "net/batch", "batch_norm"),
    ("GroupNorm_0", "net/group", "group_norm"),
    ("LayerNorm_0", "net/layer", "layer_norm"),
    ("RMSNorm_0", "net/rms", "rms_norm"),
]


class Twin(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = normjax.linen.BatchNorm(epsilon=1e-3, use_running_average=True)(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4)(x)
        x = normjax.linen.GroupNorm(2, epsilon=1e-3)(x)
        x = nn.ConvTranspose(8, (3, 2), (2, 2), padding="VALID")(x)
        x = normjax.linen.LayerNorm(epsilon=1e-3)(x)
        return normjax.linen.RMSNorm(epsilon=1e-6)(nn.Dense(5)(x))


def template():
    return jax.eval_shape(lambda: Twin().init(KEY, jnp.ones((1, 6, 6, 3))))


def random_variables():
    rng = np.random.default_rng(0)

    def draw(shape):
        # Kernels have both signs, so that the differences in a norm do not cancel.
        low = -1 if len(shape) > 1 else 0.5
        return rng.uniform(low, 1.5, shape).astype(np.float32)

    return jax.tree.map(lambda leaf: draw(leaf.shape), template())


def test_import_keras_guarantee_identity():
    weights = surgery.export_keras(random_variables(), NAMES)
    again = surgery.export_keras(surgery.import_keras(template(), weights, NAMES), NAMES)
    assert again.keys() == weights.keys()
    assert all(again[name].tobytes() == array.tobytes() for name, array in weights.items())
    norm = {name.split("/")[-1] for name in weights if "batch" in name}
    assert norm == {"gamma", "beta", "moving_mean", "moving_variance"}


def test_export_keras_guarantee_identity():
    variables = random_variables()
    weights = surgery.export_keras(variables, NAMES)
    back = surgery.import_keras(template(), weights, NAMES)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_import_keras_guarantee_all_or_nothing():
    weights = surgery.export_keras(random_variables(), NAMES)
    gamma = weights.pop("net/batch/gamma")
    with pytest.raises(ValueError, match=r"missing in the state: net/batch/gamma \(for params"):
        surgery.import_keras(template(), weights, NAMES)
    weights |= {"net/batch/gamma": gamma, "net/other/gamma": gamma}
    with pytest.raises(ValueError, match="left over in it: net/other/gamma"):
        surgery.import_keras(template(), weights, NAMES)


def test_names_of_tensorflow_are_recognized():
    weights = surgery.export_keras(random_variables(), NAMES)
    changed = {f"model/{name}:0": array for name, array in weights.items()}
    with pytest.raises(ValueError, match=r"begin with 'model/' and end in ':0': pass {name.remove"):
        surgery.import_keras(template(), changed, NAMES)
    named = {name.removesuffix(":0").removeprefix("model/"): a for name, a in changed.items()}
    surgery.import_keras(template(), named, NAMES)


def test_weights_that_are_not_a_mapping_are_an_error():
    with pytest.raises(TypeError, match=r"weights is list, expected a mapping .* Pass {w.path"):
        surgery.import_keras(template(), [], NAMES)


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore")
def test_a_keras_model_agrees_with_its_twin():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    layers = [
        keras.layers.Conv2D(4, 3, padding="same", name="conv0"),
        keras.layers.BatchNormalization(name="batch"),
        keras.layers.DepthwiseConv2D(3, padding="same", name="depthwise"),
        keras.layers.GroupNormalization(2, name="group"),
        keras.layers.Conv2DTranspose(8, (3, 2), 2, name="up"),
        keras.layers.LayerNormalization(name="layer"),
        keras.layers.Dense(5, name="dense"),
        keras.layers.RMSNormalization(epsilon=1e-6, name="rms"),
    ]
    model = keras.Sequential(layers, name="net")
    x = np.random.default_rng(1).normal(1, 2, (2, 6, 6, 3)).astype(np.float32)
    model.build(x.shape)
    weights = surgery.export_keras(
        random_variables(), [(f, t.removeprefix("net/"), k) for f, t, k in NAMES]
    )
    for weight in model.weights:
        weight.assign(weights[weight.path.removeprefix("net/")])
    by_path = {w.path.removeprefix("net/"): np.asarray(w) for w in model.weights}
    rules = [(flax, there.removeprefix("net/"), kind) for flax, there, kind in NAMES]
    variables = surgery.import_keras(template(), by_path, rules)
    want = np.asarray(model(x, training=False))
    got = jax.jit(Twin().apply)(variables, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore")
def test_attention_of_keras_gives_the_same_numbers():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    layer = keras.layers.MultiHeadAttention(2, 2, name="attention")
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    want = np.asarray(layer(x, x))
    weights = {w.path: np.asarray(w) for w in layer.weights}
    model = nn.MultiHeadDotProductAttention(2)
    empty = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))
    filled = surgery.import_keras(empty, weights, [("", "attention", "attention")])
    got = model.apply(filled, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
