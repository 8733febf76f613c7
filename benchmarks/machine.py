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
    """Says so where nothing that is measured here could be believed."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is busy (load {load:.1f}): times will be off, PyTorch's most of all.")


def keep_freed_memory() -> None:
    """Arrays of one layer get memory that was used before, as those of a layer in a network do.

    By default glibc returns freed memory to the system or not, by what was freed before, and page
    faults come and go: between three runs the time of a training step differed by up to 2.9 times,
    and by up to 1.6 times so.
    """
    # From malloc.h: never map an array on its own, never trim the heap, and have one heap.
    mmap_max, trim_threshold, arena_max = -4, -1, -8
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((mmap_max, 0), (trim_threshold, -1), (arena_max, 1)):
            mallopt(option, value)


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
