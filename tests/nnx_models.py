"""Three networks that import only flax.nnx, for the tools that must work on such models.

ConvNeXt and ViT take their norm as an argument: with `nnx.BatchNorm` every tool applies to them,
and with `nnx.LayerNorm` they equal the PyTorch models.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """A residual block (He et al. 2015), with a projection if its stride is not 1."""

    def __init__(self, before, features, stride, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        pad = dict(padding=((1, 1), (1, 1)))
        self.conv1 = conv(before, features, (3, 3), stride, **pad)
        self.bn1 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.conv2 = conv(features, features, (3, 3), **pad)
        self.bn2 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.downsample = nnx.List([])
        if stride > 1:
            norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
            self.downsample = nnx.List([conv(before, features, (1, 1), stride), norm])

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """A small ResNet with the names of torchvision."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.layer1 = nnx.List([Block(4, 4, 1, rngs)])
        self.layer2 = nnx.List([Block(4, 6, 2, rngs)])
        self.fc = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2):
            x = block(x)
        return self.fc(x.mean((1, 2)))


class ConvNeXtBlock(nnx.Module):
    """Depthwise convolution, norm, MLP, and a learned scale of the branch."""

    def __init__(self, n, norm, rngs):
        size = dict(kernel_size=(7, 7), padding=3)
        self.dwconv = nnx.Conv(n, n, **size, feature_group_count=n, rngs=rngs)
        self.norm = norm(n, rngs=rngs)
        self.pwconv1 = nnx.Linear(n, 4 * n, rngs=rngs)
        self.pwconv2 = nnx.Linear(4 * n, n, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((n,), 0.5))

    def __call__(self, x):
        y = self.pwconv1(self.norm(self.dwconv(x)))
        return x + self.pwconv2(nnx.gelu(y, approximate=False)) * self.gamma[...]


class ConvNeXt(nnx.Module):
    """A small ConvNeXt (Liu et al. 2022)."""

    def __init__(self, rngs, norm=nnx.BatchNorm):
        self.stem = nnx.Conv(3, 4, (4, 4), 4, padding="VALID", rngs=rngs)
        self.stem_norm = norm(4, rngs=rngs)
        self.blocks = nnx.List([ConvNeXtBlock(4, norm, rngs) for _ in range(2)])
        self.head_norm = norm(4, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem_norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.head_norm(x.mean((1, 2))))


class EncoderLayer(nnx.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, features, heads, norm, rngs):
        self.ln1 = norm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
        self.ln2 = norm(features, rngs=rngs)
        self.mlp1 = nnx.Linear(features, 2 * features, rngs=rngs)
        self.mlp2 = nnx.Linear(2 * features, features, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.mlp2(nnx.gelu(self.mlp1(self.ln2(x)), approximate=False))


class ViT(nnx.Module):
    """A small ViT (Dosovitskiy et al. 2021), with a norm after the convolution of the stem."""

    def __init__(self, rngs, norm=nnx.BatchNorm, features=6):
        self.patches = nnx.Conv(3, features, (4, 4), 4, padding="VALID", rngs=rngs)
        self.stem_norm = norm(features, rngs=rngs)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (1, 16, features)))
        self.layers = nnx.List([EncoderLayer(features, 2, norm, rngs) for _ in range(2)])
        self.ln = norm(features, rngs=rngs)
        self.head = nnx.Linear(features, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem_norm(self.patches(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.position[...]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.ln(x).mean(1))


MODELS = {"ResNet": ResNet, "ConvNeXt": ConvNeXt, "ViT": ViT}
