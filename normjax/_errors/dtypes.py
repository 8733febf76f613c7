"""Errors of dtypes: those that JAX does not have, and conversions from complex to real."""

from __future__ import annotations

from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# Names in other libraries.
_DTYPES = {f"{short}{bits}": f"float{bits}" for short in ("f", "fp") for bits in (16, 32, 64)}
_DTYPES["bf16"] = "bfloat16"


def output_dtype(dtype: DTypeLike | None, of_x: np.dtype) -> np.dtype:
    """The dtype of the result: that of x unless one was asked for."""
    if dtype is None:
        return of_x
    result = floating_dtype("dtype", dtype)
    if of_x.kind == "c" and result.kind != "c":
        raise TypeError(
            f"normjax: dtype={result} would drop the imaginary part of x with dtype {of_x}. "
            "Pass a complex dtype, or x.real."
        )
    return result


def floating_dtype(name: str, dtype: DTypeLike) -> np.dtype:
    """A floating or complex dtype, from anything that `jnp.dtype` accepts."""
    found = None
    # An array has a dtype but is not one.
    if not isinstance(dtype, (jax.Array, np.ndarray, np.generic)):
        with suppress(TypeError, ValueError):
            found = jnp.dtype(dtype)
    if found is not None and jnp.issubdtype(found, jnp.inexact):
        # NumPy reads "f16" as 16 bytes, a size that only complex dtypes of JAX have.
        widest = 16 if found.kind == "c" else 8
        if found.itemsize <= widest:
            return found
    meant = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    raise TypeError(
        f"normjax: {name}={dtype if found is None else found}, expected a floating or complex "
        "dtype of JAX, for example jnp.float32 or jnp.bfloat16."
        + (f" Did you mean {meant!r}?" if meant else "")
    )
