"""Compiler options: fast compilation for most tests, XLA's defaults for the others.

The suite spends most of its time compiling programs that run once, on small arrays. Import this
module before JAX: XLA reads its flags once.
"""

import os
import shutil
from pathlib import Path

# No LLVM optimization, the older and faster code generation for fusions, and one thread, since the
# programs are small. Earlier stages such as partitioning do not change.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# XLA's defaults, for jax.jit(compiler_options=) in tests of memory, of the text of programs, and of
# promises that fused arithmetic could break.
DEFAULT = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}

# Keeps XLA's default options. CI tests both.
DEFAULT_XLA = bool(os.environ.get("NORMJAX_DEFAULT_XLA"))
QUICK_FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
# The other flags of the environment; workers of pytest-xdist inherit the quick ones.
OWN_FLAGS = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in QUICK_FLAGS]

FOLDER = Path(__file__).parents[1] / ".jax_cache"
# Everything is kept: reading a small program takes a third of the time of compiling it.
CACHE = {
    "jax_compilation_cache_dir": str(FOLDER),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
# Programs of outdated code stay in the cache, so a larger one is emptied.
MOST_BYTES = 2**29


def set_up():
    """Sets environment variables, so that processes started by tests have the same options."""
    if not DEFAULT_XLA:
        os.environ["XLA_FLAGS"] = " ".join([*OWN_FLAGS, *QUICK_FLAGS])
    os.environ.update({name.upper(): str(value) for name, value in CACHE.items()})


def prune():
    """Empties a cache that is too large, in the main process, before workers start."""
    if "PYTEST_XDIST_WORKER" in os.environ or not FOLDER.exists():
        return
    if sum(path.stat().st_size for path in FOLDER.iterdir()) > MOST_BYTES:
        shutil.rmtree(FOLDER)
