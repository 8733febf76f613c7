"""A small convolutional network whose norm is an argument, for images of (N, 8, 8, 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from normjax import BatchStats

# x, running statistics, scale, bias -> y, new running statistics
Norm: TypeAlias = Callable[[Array, BatchStats, Array, Array], tuple[Array, BatchStats]]
Layers: TypeAlias = list[dict[str, Array]]
CHANNELS = [1, 16, 16, 16]
# Each of these programs runs once, for a few seconds; with XLA's defaults, compiling takes longer.
QUICK: dict[str, bool | int | float | str] = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def layers(key: Array, classes: int = 10) -> Layers:
    """Three convolutions of 3 x 3 with He's deviation and no bias, their norms, a dense layer."""
    keys = jax.random.split(key, len(CHANNELS))
    made = []
    for layer_key, (fan_in, features) in zip(keys, pairwise(CHANNELS), strict=False):
        weight = jax.random.normal(layer_key, (9 * fan_in, features)) * jnp.sqrt(2 / (9 * fan_in))
        made.append({"weight": weight, "scale": jnp.ones(features), "bias": jnp.zeros(features)})
    weight = jax.random.normal(keys[-1], (CHANNELS[-1], classes)) / jnp.sqrt(CHANNELS[-1])
    return [*made, {"weight": weight, "bias": jnp.zeros(classes)}]


def statistics(counted: bool = False) -> list[BatchStats]:
    """Running statistics of each norm that have seen nothing."""
    return [BatchStats.make(features, counted=counted) for features in CHANNELS[1:]]


def shifts(size: int, stride: int) -> np.ndarray:
    """What the rows -1, 0 and 1 of a filter see: one-hot rows of (3, size / stride, size)."""
    padded = np.eye(size + 2, dtype=np.float32)[:, 1:-1]
    return np.stack([padded[i : i + size : stride] for i in range(3)])


def convolution(x: Array, weight: Array, stride: int) -> Array:
    """3 x 3 with zero padding, as products of matrices.

    Under `jax.vmap` over weights these are batched products, which a CPU computes several times
    as fast as grouped convolutions.
    """
    rows, columns = shifts(x.shape[1], stride), shifts(x.shape[2], stride)
    patches = jnp.einsum("kip,ljq,npqc->nijklc", rows, columns, x)
    return patches.reshape(*patches.shape[:3], -1) @ weight


def logits(
    params: Layers, stats: list[BatchStats], images: Array, norm: Norm
) -> tuple[Array, list[BatchStats]]:
    """Convolution, norm and ReLU three times, mean over positions, dense."""
    x, moved = images, []
    for i, (layer, old) in enumerate(zip(params[:-1], stats, strict=True)):
        x = convolution(x, layer["weight"], stride=2 if i == 1 else 1)
        x, new = norm(x, old, layer["scale"], layer["bias"])
        x = jax.nn.relu(x)
        moved.append(new)
    return x.mean((1, 2)) @ params[-1]["weight"] + params[-1]["bias"], moved


def over_seeds(runs: Sequence[Callable[[Array], Any]], seeds: int) -> list[Any]:
    """Each run of the seeds 0, 1, 2, ..., all at once, as NumPy arrays with a leading axis.

    In two threads, since most of the time is compiling, which takes one core.
    """

    def of_all(run: Callable[[Array], Any]) -> Any:
        compiled = jax.jit(jax.vmap(run), compiler_options=QUICK)
        return jax.tree.map(np.asarray, compiled(jnp.arange(seeds)))

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(of_all, runs))
