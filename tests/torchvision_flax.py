"""Flax twins of torchvision's models, in evaluation, for `surgery.torchvision_rules`.

Sizes are arguments, as torchvision's own constructors have them; `norm` is what
`surgery.torch_fields` returns for a norm of the model. ResNet is in test_surgery_torch.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import normjax.linen


def conv(features: int, size: int, stride: int = 1, **options: Any) -> nn.Conv:
    pad = (size - 1) // 2
    return nn.Conv(features, (size, size), stride, ((pad, pad), (pad, pad)), **options)


def batch_norm(x: Any, norm: dict, name: str) -> Any:
    return normjax.linen.BatchNorm(**norm, name=name)(x, train=False)


def conv_norm(x: Any, norm: dict, name: str, act: Callable, *sizes: int, groups: int = 1) -> Any:
    """A convolution without a bias, a batch norm and an activation."""
    x = conv(*sizes, feature_group_count=groups, use_bias=False, name=f"{name}_0")(x)
    return act(batch_norm(x, norm, f"{name}_1"))


def identity(x: Any) -> Any:
    return x


class VGG(nn.Module):
    widths: Sequence[int | str]  # "M" for a pooling
    hidden: int
    classes: int
    norm: dict | None = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        i = 0
        for width in self.widths:
            if width == "M":
                x = nn.max_pool(x, (2, 2), (2, 2))
                i += 1
                continue
            x = conv(width, 3, name=f"features_{i}")(x)
            if self.norm is not None:
                x = batch_norm(x, self.norm, f"features_{i + 1}")
            x = nn.relu(x)
            i += 2 if self.norm is None else 3
        # PyTorch flattens (channels, height, width).
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, name="classifier_0")(x))
        x = nn.relu(nn.Dense(self.hidden, name="classifier_3")(x))
        return nn.Dense(self.classes, name="classifier_6")(x)


class DenseLayer(nn.Module):
    growth: int
    bottleneck: int
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.relu(batch_norm(x, self.norm, "norm1"))
        y = conv(self.bottleneck * self.growth, 1, use_bias=False, name="conv1")(y)
        y = nn.relu(batch_norm(y, self.norm, "norm2"))
        y = conv(self.growth, 3, use_bias=False, name="conv2")(y)
        return jnp.concatenate([x, y], -1)


class DenseBlock(nn.Module):
    layers: int
    layer: tuple

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for j in range(self.layers):
            x = DenseLayer(*self.layer, name=f"denselayer{j + 1}")(x)
        return x


class Transition(nn.Module):
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.relu(batch_norm(x, self.norm, "norm"))
        y = conv(x.shape[-1] // 2, 1, use_bias=False, name="conv")(y)
        return nn.avg_pool(y, (2, 2), (2, 2))


class DenseNet(nn.Module):
    growth: int
    blocks: Sequence[int]
    features: int
    bottleneck: int
    classes: int
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = conv(self.features, 7, 2, use_bias=False, name="conv0")(x)
        x = nn.relu(batch_norm(x, self.norm, "norm0"))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, layers in enumerate(self.blocks):
            x = Transition(self.norm, name=f"transition{i}")(x) if i else x
            layer = (self.growth, self.bottleneck, self.norm)
            x = DenseBlock(layers, layer, name=f"denseblock{i + 1}")(x)
        x = nn.relu(batch_norm(x, self.norm, "norm5"))
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


class SqueezeExcitation(nn.Module):
    squeezed: int
    act: Callable
    gate: Callable

    @nn.compact
    def __call__(self, x: Any) -> Any:
        s = self.act(conv(self.squeezed, 1, name="fc1")(x.mean((1, 2), keepdims=True)))
        return x * self.gate(conv(x.shape[-1], 1, name="fc2")(s))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2, V3 and EfficientNet; V2 names its layers differently."""

    kernel: int
    expanded: int
    features: int
    squeezed: int
    act: Callable
    stride: int
    gate: Callable
    norm: dict
    version2: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        name, k, y = "conv" if self.version2 else "block", 0, x
        if self.expanded != x.shape[-1]:
            y, k = conv_norm(y, self.norm, f"{name}_0", self.act, self.expanded, 1), 1
        y = conv_norm(
            y, self.norm, f"{name}_{k}", self.act, self.expanded, self.kernel, self.stride,
            groups=self.expanded,
        )  # fmt: skip
        if self.squeezed:
            k += 1
            y = SqueezeExcitation(self.squeezed, self.act_of_gate, self.gate, name=f"{name}_{k}")(y)
        if self.version2:
            y = conv(self.features, 1, use_bias=False, name=f"{name}_{k + 1}")(y)
            y = batch_norm(y, self.norm, f"{name}_{k + 2}")
        else:
            y = conv_norm(y, self.norm, f"{name}_{k + 1}", identity, self.features, 1)
        return x + y if x.shape == y.shape and self.stride == 1 else y

    @property
    def act_of_gate(self) -> Callable:
        # MobileNetV3 has ReLU in the gate, whatever the activation of the block is.
        return nn.relu if self.gate is nn.hard_sigmoid else self.act


class MobileNetV2(nn.Module):
    stem: int
    blocks: Sequence[tuple[int, int, int, int]]  # expansion, features, layers, stride
    last: int
    classes: int
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x, i = conv_norm(x, self.norm, "features_0", nn.relu6, self.stem, 3, 2), 1
        for expansion, features, layers, stride in self.blocks:
            for j in range(layers):
                x = InvertedResidual(
                    3, expansion * x.shape[-1], features, 0, nn.relu6, 1 if j else stride,
                    identity, self.norm, version2=True, name=f"features_{i}",
                )(x)  # fmt: skip
                i += 1
        x = conv_norm(x, self.norm, f"features_{i}", nn.relu6, self.last, 1)
        return nn.Dense(self.classes, name="classifier_1")(x.mean((1, 2)))


class MobileNetV3(nn.Module):
    stem: int
    blocks: Sequence[tuple]  # kernel, expanded, features, squeezed, activation, stride
    last: int
    hidden: int
    classes: int
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = conv_norm(x, self.norm, "features_0", nn.hard_swish, self.stem, 3, 2)
        for i, block in enumerate(self.blocks):
            name = f"features_{i + 1}"
            x = InvertedResidual(*block, nn.hard_sigmoid, self.norm, name=name)(x)
        name = f"features_{len(self.blocks) + 1}"
        x = conv_norm(x, self.norm, name, nn.hard_swish, self.last, 1)
        x = nn.hard_swish(nn.Dense(self.hidden, name="classifier_0")(x.mean((1, 2))))
        return nn.Dense(self.classes, name="classifier_3")(x)


class EfficientNet(nn.Module):
    stem: int
    stages: Sequence[tuple[int, int, int, int, int]]  # expansion, kernel, stride, features, layers
    last: int
    classes: int
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = conv_norm(x, self.norm, "features_0", nn.silu, self.stem, 3, 2)
        for i, (expansion, kernel, stride, features, layers) in enumerate(self.stages):
            for j in range(layers):
                width = x.shape[-1]
                x = InvertedResidual(
                    kernel, expansion * width, features, max(1, width // 4), nn.silu,
                    1 if j else stride, nn.sigmoid, self.norm, name=f"features_{i + 1}_{j}",
                )(x)  # fmt: skip
        x = conv_norm(x, self.norm, f"features_{len(self.stages) + 1}", nn.silu, self.last, 1)
        return nn.Dense(self.classes, name="classifier_1")(x.mean((1, 2)))


class ConvNeXtBlock(nn.Module):
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        n = x.shape[-1]
        y = conv(n, 7, feature_group_count=n, name="block_0")(x)
        y = normjax.linen.LayerNorm(**self.norm, name="block_2")(y)
        y = nn.gelu(nn.Dense(4 * n, name="block_3")(y), approximate=False)
        y = nn.Dense(n, name="block_5")(y)
        # PyTorch's shape, for channels first.
        layer_scale = self.param("layer_scale", nn.initializers.constant(1e-6), (n, 1, 1))
        return x + y * layer_scale.reshape(1, 1, 1, n)


class ConvNeXt(nn.Module):
    stages: Sequence[tuple[int, int]]  # features, layers
    classes: int
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def layer_norm(name: str) -> Callable:
            return normjax.linen.LayerNorm(**self.norm, name=name)

        def patches(features: int, size: int, name: str) -> Callable:
            return nn.Conv(features, (size, size), size, "VALID", name=name)

        for i, (features, layers) in enumerate(self.stages):
            if i == 0:
                x = layer_norm("features_0_1")(patches(features, 4, "features_0_0")(x))
            else:
                x = layer_norm(f"features_{2 * i}_0")(x)
                x = patches(features, 2, f"features_{2 * i}_1")(x)
            for j in range(layers):
                x = ConvNeXtBlock(self.norm, name=f"features_{2 * i + 1}_{j}")(x)
        x = layer_norm("classifier_0")(x.mean((1, 2)))
        return nn.Dense(self.classes, name="classifier_2")(x)


class EncoderLayer(nn.Module):
    heads: int
    hidden: int
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = normjax.linen.LayerNorm(**self.norm, name="ln_1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="self_attention")(y)
        y = normjax.linen.LayerNorm(**self.norm, name="ln_2")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="mlp_0")(y), approximate=False)
        return x + nn.Dense(x.shape[-1], name="mlp_3")(y)


class Encoder(nn.Module):
    layers: int
    layer: tuple
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.layers):
            x = EncoderLayer(*self.layer, name=f"encoder_layer_{i}")(x)
        return normjax.linen.LayerNorm(**self.norm, name="ln")(x)


class VisionTransformer(nn.Module):
    patch: int
    layers: int
    heads: int
    features: int
    hidden: int
    classes: int
    norm: dict

    @nn.compact
    def __call__(self, x: Any) -> Any:
        size = (self.patch, self.patch)
        x = nn.Conv(self.features, size, size, "VALID", name="conv_proj")(x)
        x = x.reshape(x.shape[0], -1, self.features)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.features))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        layer = (self.heads, self.hidden, self.norm)
        x = Encoder(self.layers, layer, self.norm, name="encoder")(x)
        return nn.Dense(self.classes, name="head")(x[:, 0])
