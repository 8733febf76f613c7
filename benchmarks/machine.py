"""The machine and versions of a measurement, and options that the command lines share."""

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
    """An option that takes several values, separated by commas."""
    return text.split(",")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def prepare() -> None:
    """Prints a warning if the machine is too busy for reliable times."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is busy (load {load:.1f}): times are unreliable, mostly PyTorch's.")


def keep_freed_memory() -> None:
    """Makes arrays reuse memory that is already allocated, as in a network.

    By default glibc sometimes returns freed memory to the system, so page faults vary: the time of
    a training step differed by up to 2.9 times between three runs, and by up to 1.6 times with
    these settings.
    """
    # Options of malloc.h: no array is mapped separately, the heap is never trimmed, one heap.
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
    """The name of the device that JAX runs on; for a CPU, JAX itself reports only "cpu"."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return kind
