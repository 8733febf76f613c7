"""The dtypes in which statistics are accumulated."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

HALF = (np.dtype(jnp.float16), np.dtype(jnp.bfloat16))


def accumulation_dtype(*dtypes: np.dtype) -> np.dtype:
    """The common dtype, at least float32; float64 and complex are kept."""
    # NumPy's promotion, since that of JAX raises under strict promotion.
    return reduce(np.promote_types, dtypes, np.dtype(np.float32))


def common_dtype(*arrays: Any) -> np.dtype:
    """The accumulation dtype of all arrays that are not None."""
    return accumulation_dtype(*(v.dtype for v in arrays if v is not None))


def real_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of absolute values."""
    return jnp.finfo(dtype).dtype


def upcast(x: Array) -> Array:
    """x in its accumulation dtype."""
    return x.astype(accumulation_dtype(x.dtype))


def abs_square(x: Array) -> Array:
    """|x|^2, real."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
