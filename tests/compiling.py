"""How the compiler is told to hurry, and how a test asks for the program that users get.

Most of the time of the suite is compiling, and its programs run once, on a few numbers. Imported
before JAX: XLA reads its flags once.
"""

import os
import shutil
from pathlib import Path

# No optimization by LLVM, and the older, shorter way from fusions to machine code. What is decided
# before, as partitioning, stays as it is. The fourth saves threads for programs that are small.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# XLA's defaults, for jax.jit(compiler_options=): memory and text of programs, and promises that
# fused arithmetic could break.
DEFAULT = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}

# Leaves the compiler as users have it; CI tests both.
DEFAULT_XLA = bool(os.environ.get("NORMJAX_DEFAULT_XLA"))
QUICK_FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
# What the environment says besides; a process of pytest-xdist has the quick ones already.
OWN_FLAGS = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in QUICK_FLAGS]

FOLDER = Path(__file__).parents[1] / ".jax_cache"
# Everything is kept: reading a small program takes a third of the time of compiling it.
CACHE = {
    "jax_compilation_cache_dir": str(FOLDER),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
# Programs of code that has changed stay in it: beyond this it starts anew.
MOST_BYTES = 2**29


def set_up():
    """By the environment, so that processes which tests start have the same options."""
    if not DEFAULT_XLA:
        os.environ["XLA_FLAGS"] = " ".join([*OWN_FLAGS, *QUICK_FLAGS])
    os.environ.update({name.upper(): str(value) for name, value in CACHE.items()})


def prune():
    """Empties a cache that has grown too large; by one process, before the others start."""
    if "PYTEST_XDIST_WORKER" in os.environ or not FOLDER.exists():
        return
    if sum(path.stat().st_size for path in FOLDER.iterdir()) > MOST_BYTES:
        shutil.rmtree(FOLDER)
