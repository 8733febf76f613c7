"""The layers to measure, named after their networks, and their floors."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

EPSILON, MOMENTUM = 1e-5, 0.99

# The floor is the least memory traffic of a layer, in tensors of the size of x, if such a tensor
# does not fit into the cache. Batch norm needs all of x before it can write the first y:
#   forward   read x for the statistics, read x, write y
#   backward  read x and dy for the two sums, read x and dy, write dx
# The others reduce over a row or a group, which stays in the cache until it is read again:
#   forward   read x, write y
#   backward  read x and dy, write dx
# In evaluation all of them read x and write y.
TRAINING_FLOOR = {"batch_norm": 8}
TRAINING_FLOOR_OF_ROWS = 5
EVALUATION_FLOOR = 2


class Layer(NamedTuple):
    """One row of the table; features are the last axis of x. `num_groups` is for group norm."""

    name: str
    kind: str
    shape: tuple[int, ...]
    num_groups: int | None = None

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name} {self.shape}"

    @property
    def features(self) -> int:
        return self.shape[-1]

    @property
    def example(self) -> tuple[int, ...]:
        """The smallest shape whose layer has the same parameters."""
        return (1,) * (len(self.shape) - 1) + (self.features,)

    def bytes(self, dtype) -> int:
        return prod(self.shape) * np.dtype(dtype).itemsize

    def tensors_moved(self, mode: str) -> int:
        if mode == "evaluation":
            return EVALUATION_FLOOR
        return TRAINING_FLOOR.get(self.kind, TRAINING_FLOOR_OF_ROWS)


LAYERS = (
    Layer("ResNet-50 stage 1", "batch_norm", (32, 56, 56, 64)),
    Layer("ResNet-50 stage 2", "batch_norm", (32, 28, 28, 256)),
    Layer("ResNet-50 stage 4", "batch_norm", (32, 7, 7, 2048)),
    Layer("MLP", "batch_norm", (8192, 512)),
    Layer("ViT-B", "layer_norm", (32, 197, 768)),
    Layer("ConvNeXt-T stage 1", "layer_norm", (32, 56, 56, 96)),
    Layer("Llama-2 7B", "rms_norm", (2048, 4096)),
    Layer("TinyLlama", "rms_norm", (4, 1024, 2048)),
    Layer("Stable Diffusion U-Net", "group_norm", (4, 64, 64, 320), 32),
    Layer("Stable Diffusion U-Net, inner", "group_norm", (4, 32, 32, 640), 32),
    Layer("style transfer, residual", "instance_norm", (4, 64, 64, 128)),
    Layer("style transfer, outer", "instance_norm", (4, 256, 256, 32)),
)
