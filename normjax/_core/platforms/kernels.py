"""A CPU with normjax-cpu: kernels that XLA calls, each in the place of a norm or of its derivative.

A kernel reads a row once, measures it while it lies in cache, and writes y: 2 tensors forward and 3
backward, where what XLA's CPU compiler makes of the formula moves 11 to 14. Along columns it reads
x twice. Measured in benchmarks/results/speed.md.
"""

from __future__ import annotations

import functools
import re
import warnings
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir

from normjax._core.dtypes import accumulation_dtype
from normjax._core.mask import Count
from normjax._core.platforms import cpu

# The arguments of the kernels that are called below, as normjax-cpu numbers them.
INTERFACE = 1
REBUILD = "Build it again, from a clone: pip install --force-reinstall ./native"

DTYPES = tuple(map(np.dtype, (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)))
# A row that goes through the second cache of a core more than once is no gain.
LONGEST_ROW = 65536


class Rows(NamedTuple):
    """x as (rows, entries): each row has its statistics."""

    rows: int
    entries: int

    @property
    def shape(self) -> tuple[int, int]:
        """That of x for the kernels."""
        return self.rows, self.entries

    @property
    def features(self) -> int:
        """How many entries scale and bias have."""
        return self.entries

    normalizes = True

    def to_features(self, v: Array) -> Array:
        """What the kernels give, as the norms keep it: one for each row."""
        return v

    def of_features(self, v: Array) -> Array:
        """What the norms keep, as the kernels take it."""
        return v.reshape(self.rows)


class Columns(NamedTuple):
    """x as (examples, rows, features): each group of features of an example has its statistics."""

    examples: int
    rows: int
    features: int
    groups: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of x for the kernels."""
        return self.examples, self.rows, self.features

    @property
    def normalizes(self) -> bool:
        """Whether y is written by the kernel that measures x, while it lies in cache."""
        return self.examples > 1

    def to_features(self, v: Array) -> Array:
        """What the kernels give for each group, for each of its features."""
        wide = (self.examples, self.groups, self.features // self.groups)
        return jnp.broadcast_to(v[..., None], wide)

    def of_features(self, v: Array) -> Array:
        """What the features of a group have in common."""
        return v.reshape(self.examples, self.groups, -1)[..., 0]

    def blocks(self, itemsize: int) -> int:
        """Pieces of an example that are summed by themselves: 64 kB or more, 64 rows or more."""
        rows = max(64, 65536 // (self.features * itemsize))
        return -(-self.rows // rows)


View = Rows | Columns


def view(shape: tuple[int, ...], axes: tuple[int, ...], groups: Any = None) -> View | None:
    """How the kernels see an x that is reduced over `axes`; None where they cannot."""
    if not all(isinstance(n, int) for n in shape) or 0 in shape:
        return None
    first, end = axes[0], axes[-1] + 1
    if end - first != len(axes):
        return None
    kept, reduced, features = (prod(v) for v in (shape[:first], shape[first:end], shape[end:]))
    if groups is not None:
        last = groups.axis == end == len(shape) - 1
        return Columns(kept, reduced, features, groups.groups) if last else None
    if end == len(shape):
        return Rows(kept, reduced) if reduced <= LONGEST_ROW else None
    return Columns(kept, reduced, features, features)


def forward(
    x: Array, scale: Array | None, bias: Array | None, epsilon: Array, how: View,
    centered: bool, divisor: float,
) -> list[Array]:  # fmt: skip
    """y, and mean and m2 of each row, or of each group of each example."""
    dtype, size = accumulation_dtype(x.dtype), x.dtype.itemsize
    vectors = [_vector(v, how.features, dtype) for v in (scale, bias)]
    given = x.reshape(how.shape), *vectors, epsilon.astype(dtype)
    y = jax.ShapeDtypeStruct(how.shape, x.dtype)
    if isinstance(how, Rows):
        each = jax.ShapeDtypeStruct((how.rows,), dtype)
        attributes = dict(centered=centered, divisor=np.float64(divisor))
        out = _call("normjax_rows_forward", [y, each, each], *given, **attributes)
    else:
        each = jax.ShapeDtypeStruct((how.examples, how.groups), dtype)
        blocks = how.blocks(size)
        parts = jax.ShapeDtypeStruct((how.examples, blocks, 2, how.features), dtype)
        vector = jax.ShapeDtypeStruct((how.examples, 3, how.features), dtype)
        out = _call("normjax_columns_forward", [y, each, each, parts, vector], *given)[:3]
    y, mean, m2 = out
    return [y.reshape(x.shape), mean, m2]


def backward(
    dy: Array, x: Array, mean: Array, inverse: Array, scale: Array | None, how: View,
    centered: bool, divisor: float, affine: bool,
) -> list[Array]:  # fmt: skip
    """dx, and dscale and dbias of (features,) if `affine`.

    mean and inverse, the reciprocal of the deviation, are of each row, or of each group of each
    example.
    """
    dtype, size = accumulation_dtype(x.dtype), x.dtype.itemsize
    pair = dy.reshape(how.shape), x.reshape(how.shape)
    given = *pair, mean, inverse, _vector(scale, how.features, dtype)
    dx = jax.ShapeDtypeStruct(how.shape, x.dtype)
    if isinstance(how, Rows):
        blocks = max(1, min(8, how.rows // 8), how.rows // 64)
        entries = how.entries if affine else 0
        vector = jax.ShapeDtypeStruct((entries,), dtype)
        parts = jax.ShapeDtypeStruct((blocks, 2, entries), dtype)
        attributes = dict(centered=centered, divisor=np.float64(divisor))
        results = [dx, vector, vector, parts]
        dx, dscale, dbias, _ = _call("normjax_rows_backward", results, *given, **attributes)
        return [dx.reshape(x.shape), dscale, dbias]
    sums = jax.ShapeDtypeStruct((how.examples, 2, how.features), dtype)
    parts = jax.ShapeDtypeStruct((how.examples, how.blocks(size), 2, how.features), dtype)
    vectors = jax.ShapeDtypeStruct((how.examples, 4, how.features), dtype)
    dx, sums, *_ = _call("normjax_columns_backward", [dx, sums, parts, vectors], *given)
    if not affine:
        return [dx.reshape(x.shape)]
    of_group = sums[:, 1].reshape(*inverse.shape, -1) * inverse[..., None]
    dscale = jnp.sum(of_group, 0).reshape(-1)
    return [dx.reshape(x.shape), dscale, jnp.sum(sums[:, 0], 0)]


def measure(
    x: Array, mask: Array | None, count: Count, *, axes: tuple[int, ...], centered: bool, kept: bool
) -> tuple[Array, Array]:
    """mean and m2 along columns; by the CPU's own form what the kernel does not know."""
    how = view(x.shape, axes)
    knows = plugin() is not None and mask is None and centered and x.dtype in DTYPES
    if not knows or not isinstance(how, Columns):
        return cpu.measure(x, mask, count, axes=axes, centered=centered, kept=kept)
    dtype = accumulation_dtype(x.dtype)
    each = jax.ShapeDtypeStruct((how.examples, how.features), dtype)
    blocks = how.blocks(x.dtype.itemsize)
    parts = jax.ShapeDtypeStruct((how.examples, blocks, 2, how.features), dtype)
    mean, m2, _ = _call("normjax_columns_moments", [each, each, parts], x.reshape(how.shape))
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    return mean.reshape(shape), m2.reshape(shape)


totals = cpu.totals


def _vector(v: Array | None, features: int, dtype: np.dtype) -> Array:
    """No entry says that there is no vector."""
    return jnp.zeros((0,), dtype) if v is None else v.reshape(features).astype(dtype)


@functools.cache
def plugin() -> ModuleType | None:
    """normjax-cpu, its kernels known to XLA; None where it is not installed or does not fit."""
    try:
        import normjax_cpu
    except ImportError:
        return None
    fault = _fault(normjax_cpu.INTERFACE, normjax_cpu.XLA_FFI_VERSION)
    if fault:
        warnings.warn(
            f"normjax: the installed normjax-cpu {fault}. Norms run on the CPU without its "
            f"kernels. {REBUILD}",
            stacklevel=2,
        )
        return None
    for name, function in normjax_cpu.functions().items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return normjax_cpu


def _fault(interface: int, version: tuple[int, int]) -> str | None:
    """Why a library does not fit to this normjax and this jaxlib."""
    if interface != INTERFACE:
        return f"has interface {interface}, expected {INTERFACE}"
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    own = tuple(
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1])  # type: ignore[index]
        for part in ("MAJOR", "MINOR")
    )
    # XLA calls what was built for an older minor version.
    if version[0] != own[0] or version[1] > own[1]:
        built, running = (".".join(map(str, v)) for v in (version, own))
        return f"was built for version {built} of XLA's FFI, and this jaxlib has {running}"
    return None


def _call(name: str, results: list[Any], *operands: Array, **attributes: Any) -> list[Array]:
    """Calls a kernel, in what is being lowered.

    `jax.ffi.ffi_call` asks that all operands vary along the same mapped axes, which matters to
    derivatives and no more to what is lowered.
    """
    return _call_p.bind(
        *operands, name=name, results=tuple(results), attributes=tuple(attributes.items())
    )


def _lowering(context: Any, *operands: Any, name: str, results: Any, attributes: Any) -> Any:
    return jax.ffi.ffi_lowering(name)(context, *operands, **dict(attributes))


_call_p = Primitive("normjax_cpu")
_call_p.multiple_results = True
_call_p.def_abstract_eval(
    lambda *_, results, **__: [jax.core.ShapedArray(r.shape, r.dtype) for r in results]
)
mlir.register_lowering(_call_p, _lowering, platform="cpu")
