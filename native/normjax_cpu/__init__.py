"""CPU kernels for normjax, which finds and calls them. This package has no API for users."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

KERNELS = (
    "normjax_rows_forward",
    "normjax_rows_backward",
    "normjax_columns_moments",
    "normjax_columns_forward",
    "normjax_columns_backward",
)


def _load(processor: str) -> ctypes.CDLL:
    """The library for a generation of processors."""
    (path,) = Path(__file__).parent.glob(f"libnormjax_cpu_{processor}.*")
    return ctypes.CDLL(str(path))


_processor = _load("baseline").normjax_processor
_processor.restype = ctypes.c_char_p
PROCESSOR: str = _processor().decode()
_library = _load(PROCESSOR)

INTERFACE: int = _library.normjax_interface()
XLA_FFI_VERSION: tuple[int, int] = (
    _library.normjax_xla_ffi_major(),
    _library.normjax_xla_ffi_minor(),
)


def functions() -> dict[str, Any]:
    """The functions that XLA calls, by the name under which each is registered."""
    return {name: getattr(_library, name) for name in KERNELS}
