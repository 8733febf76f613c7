"""Descriptions of accelerators that are not present: XLA compiles for them all the same.

A TPU needs the wheel libtpu. A GPU needs the CUDA plugin of JAX, and ptxas from the wheel
nvidia-cuda-nvcc-cu12. Programs are compiled but not run, and no driver is needed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

GPU, TPU = PLATFORMS = ("gpu", "tpu")
TOPOLOGY = "v5e:2x2"  # TPU generation and topology
DEVICES = 4

# The description of an H100 SXM by CUDA.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def prepare() -> None:
    """Makes this process use no present device but the CPU."""
    jax.config.update("jax_platforms", "cpu")
    # Without these, libtpu asks the hardware or a cloud for the kind of TPU, and only one process
    # at a time may load it, since it may hold a TPU. Here no process does.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)


def devices(platform: str, topology: str = TOPOLOGY) -> Sequence[jax.Device]:
    """Four described devices: H100s, or the TPUs of a topology such as 'v6e:2x2'."""
    prepare()
    if platform == TPU:
        return topologies.get_topology_desc(topology, "tpu").devices[:DEVICES]
    if not shutil.which("ptxas"):
        wheel = Path(jax.__file__).parents[1] / "nvidia" / "cuda_nvcc" / "bin"
        os.environ["PATH"] += f"{os.pathsep}{wheel}"
    options = dict(target_config=H100, topology=f"1x1x{DEVICES}")
    return topologies.get_topology_desc("h100", "cuda", **options).devices


def compile_for(
    devices: Sequence[jax.Device], function: Callable, whole: Any, batched: Any
) -> jax.stages.Compiled:
    """Compiles `function(whole, batched)` for these devices, from arrays or their shapes.

    With several devices the first axes of `batched` are sharded, and `whole` is replicated.
    """
    if len(devices) == 1:
        there = split = SingleDeviceSharding(devices[0])
    else:
        mesh = Mesh(devices, ("batch",))
        there, split = (NamedSharding(mesh, place) for place in (P(), P("batch")))

    def described(tree: Any, sharding: Any) -> Any:
        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(one, tree)

    lowered = jax.jit(function).lower(described(whole, there), described(batched, split))
    return lowered.compile()
