"""Where and with what is measured, and what the command lines have in common."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Sequence
from datetime import date

import jax

from benchmarks.peers import described

DTYPES = ("float32", "bfloat16")


def words(text: str) -> list[str]:
    """An option that takes several values, with commas between them."""
    return text.split(",")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def prepare() -> None:
    """Call it before anything else is measured or allocated."""
    keep_freed_memory()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is busy (load {load:.1f}): times will be off, PyTorch's most of all.")


def keep_freed_memory() -> None:
    """Has glibc hand freed memory out again; without it large arrays are fresh at each call.

    The kernel clears fresh pages at a tenth of the speed of a copy, so that beyond 32 MB all
    libraries would be measured by the time of their page faults.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((trim_threshold, 2**31 - 1), (mmap_max, 0), (arena_max, 1)):
            libc.mallopt(option, value)


def circumstances(peers: Sequence[str], repeats: int) -> str:
    libraries = ", ".join(dict.fromkeys(described(name) for name in peers))
    return (
        f"{date.today()}, {processor()} ({platform.machine()}, {cores()} cores), "
        f"jax {jax.__version__}, {libraries}; medians of at least {repeats} interleaved calls."
    )


def processor() -> str:
    """The name of the device that JAX runs on; for a CPU JAX itself knows no more than that."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return kind
