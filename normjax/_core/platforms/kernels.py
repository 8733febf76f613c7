"""A CPU with normjax-cpu: XLA calls one kernel for a norm, and one for its derivative.

A kernel reads a row once, measures it in cache, and writes y. It reads and writes 2 tensors forward
and 3 backward; XLA's CPU compiler needs 11 to 14 for the formula. Along columns a kernel reads x
twice. Measured in docs/results/speed.md.
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

from normjax._core import algorithms
from normjax._core.dtypes import accumulation_dtype
from normjax._core.mask import Count
from normjax._core.platforms.cpu import totals

# The version of the kernels' arguments that is used below, as normjax-cpu numbers it.
INTERFACE = 1
REBUILD = (
    "Build it again, in a clone of normjax: pip install scikit-build-core cmake ninja && "
    "pip install --force-reinstall --no-deps --no-build-isolation ./native"
)

DTYPES = tuple(map(np.dtype, (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)))
# Shorter rows than a vector, and rows that do not fit in the second-level cache of a core, are not
# faster with kernels.
SHORTEST_ROW, LONGEST_ROW = 16, 65536


class Rows(NamedTuple):
    """x as (rows, features): each row has its own statistics, and each entry its scale and bias.

    Attributes:
        rows, features: the shape of x.
        centered: around the mean of the row, or around zero.
        divisor: of m2; y is divided by sqrt(m2 / divisor + epsilon).
    """

    rows: int
    features: int
    centered: bool
    divisor: float

    @property
    def normalizes(self) -> bool:
        """Whether y is written while x is in cache."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of x for the kernels."""
        return self.rows, self.features

    @property
    def statistics(self) -> tuple[int, ...]:
        """The shape of mean and m2 for the kernels."""
        return (self.rows,)

    def spread(self, v: Array) -> Array:
        """A statistic of a kernel in the form of the norms: one for each row."""
        return v

    def collect(self, v: Array) -> Array:
        """A statistic of the norms in the form of a kernel."""
        return v.reshape(self.statistics)

    def forward(self, *given: Array) -> list[Array]:
        """y, mean and m2."""
        x, *_, epsilon = given
        each = _like(epsilon, *self.statistics)
        return _call(
            "normjax_rows_forward", [_like(x, *self.shape), each, each], *given, **self._how
        )

    def backward(self, *given: Array, affine: bool) -> list[Array]:
        """dx, and dscale and dbias if `affine`."""
        x, mean = given[1:3]
        features = self.features if affine else 0
        # Pieces of 256 kB and of 64 rows or more, and several pieces for threads.
        rows = max(64, 2**18 // (self.features * x.dtype.itemsize))
        blocks = max(1, min(8, self.rows // 8), self.rows // rows)
        vector, parts = _like(mean, features), _like(mean, blocks, 2, features)
        results = [_like(x, *self.shape), vector, vector, parts]
        dx, *sums, _ = _call("normjax_rows_backward", results, *given, **self._how)
        return [dx, *sums] if affine else [dx]

    @property
    def _how(self) -> dict[str, Any]:
        return dict(centered=self.centered, divisor=np.float64(self.divisor))


class Columns(NamedTuple):
    """x as (examples, rows, features): each group of features of an example has its statistics."""

    examples: int
    rows: int
    features: int
    groups: int

    @property
    def normalizes(self) -> bool:
        """Whether y is written while x is in cache.

        Not in batch norm, where XLA fuses y with the activation that follows.
        """
        return self.examples > 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of x for the kernels."""
        return self.examples, self.rows, self.features

    @property
    def statistics(self) -> tuple[int, ...]:
        """The shape of mean and m2 for the kernels."""
        return self.examples, self.groups

    def spread(self, v: Array) -> Array:
        """Repeats the statistic of a group for each of its features."""
        wide = (*self.statistics, self.features // self.groups)
        return jnp.broadcast_to(v[..., None], wide)

    def collect(self, v: Array) -> Array:
        """The statistic of a group, from those of its features."""
        return v.reshape(*self.statistics, -1)[..., 0]

    def moments(self, x: Array, dtype: np.dtype) -> list[Array]:
        """mean and m2 of each feature of each example."""
        each = jax.ShapeDtypeStruct((self.examples, self.features), dtype)
        results = [each, each, self._parts(x, each)]
        return _call("normjax_columns_moments", results, x.reshape(self.shape))[:2]

    def forward(self, *given: Array) -> list[Array]:
        """y, mean and m2."""
        x, *_, epsilon = given
        each, vectors = _like(epsilon, *self.statistics), (self.examples, 3, self.features)
        results = [_like(x, *self.shape), each, each, self._parts(x, epsilon)]
        return _call("normjax_columns_forward", [*results, _like(epsilon, *vectors)], *given)[:3]

    def backward(self, *given: Array, affine: bool) -> list[Array]:
        """dx, and dscale and dbias if `affine`."""
        x, mean, inverse = given[1:4]
        sums, vectors = (_like(mean, self.examples, n, self.features) for n in (2, 4))
        results = [_like(x, *self.shape), sums, self._parts(x, mean), vectors]
        dx, both, *_ = _call("normjax_columns_backward", results, *given)
        if not affine:
            return [dx]
        of_groups = both[:, 1].reshape(*self.statistics, -1) * inverse[..., None]
        return [dx, jnp.sum(of_groups, 0).reshape(-1), jnp.sum(both[:, 0], 0)]

    def _parts(self, x: Array, like: Any) -> jax.ShapeDtypeStruct:
        """Two numbers for each feature of a piece, which one thread processes at a time.

        An example of up to 512 kB, which fits in the second-level cache of a core, is one piece.
        Larger ones have pieces of 256 to 512 kB and of 64 rows or more.
        """
        row = self.features * x.dtype.itemsize
        size = self.rows * row
        piece = size if size <= 2**19 else min(max(size // 16, 2**18), 2**19)
        rows = max(64, -(-piece // row))
        return _like(like, self.examples, -(-self.rows // rows), 2, self.features)


View = Rows | Columns


def view(
    shape: tuple[int, ...], axes: tuple[int, ...], groups: Any = None, centered: bool = True,
    summed: bool = False,
) -> View | None:  # fmt: skip
    """How the kernels view an x that is reduced over `axes`; None if they do not support it."""
    known = axes and all(isinstance(n, int) for n in shape) and 0 not in shape
    if not known or axes != tuple(range(axes[0], axes[-1] + 1)):
        return None
    first, end = axes[0], axes[-1] + 1
    kept, reduced, features = (prod(v) for v in (shape[:first], shape[first:end], shape[end:]))
    if groups is not None:
        last = groups.axis == end == len(shape) - 1
        return Columns(kept, reduced, features, groups.groups) if last else None
    if end == len(shape):
        divisor = 1.0 if summed else float(reduced)
        fits = SHORTEST_ROW <= reduced <= LONGEST_ROW
        return Rows(kept, reduced, centered, divisor) if fits else None
    return Columns(kept, reduced, features, features) if centered and not summed else None


def forward(
    how: View, x: Array, scale: Array | None, bias: Array | None, epsilon: Array
) -> list[Array]:
    """y, mean and m2."""
    vectors = (_vector(v, how, epsilon.dtype) for v in (scale, bias))
    y, *moments = how.forward(x.reshape(how.shape), *vectors, epsilon)
    return [y.reshape(x.shape), *map(how.spread, moments)]


def backward(
    how: View, dy: Array, x: Array, mean: Array, inverse: Array, scale: Array | None, affine: bool
) -> list[Array]:
    """dx, and dscale and dbias if `affine`; `inverse` is the reciprocal of the deviation."""
    pair, each = (v.reshape(how.shape) for v in (dy, x)), map(how.collect, (mean, inverse))
    dx, *sums = how.backward(*pair, *each, _vector(scale, how, mean.dtype), affine=affine)
    return [dx.reshape(x.shape), *sums]


def measure(
    x: Array, mask: Array | None, count: Count, *, axes: tuple[int, ...], centered: bool, kept: bool
) -> tuple[Array, Array]:
    """mean and m2 along columns by a kernel; by plain sums if no kernel supports x."""
    how = view(x.shape, axes)
    knows = plugin() is not None and mask is None and centered and x.dtype in DTYPES
    if not knows or not isinstance(how, Columns):
        return algorithms.measure(x, mask, count, axes, centered, totals)
    mean, m2 = how.moments(x, accumulation_dtype(x.dtype))
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    return mean.reshape(shape), m2.reshape(shape)


def _vector(v: Array | None, how: View, dtype: np.dtype) -> Array:
    """A vector for a kernel; an empty array stands for None."""
    return jnp.zeros((0,), dtype) if v is None else v.reshape(how.features).astype(dtype)


def _like(v: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, v.dtype)


@functools.cache
def plugin() -> ModuleType | None:
    """normjax-cpu, with its kernels registered; None if it is not installed or not compatible."""
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
    """Why a library is not compatible with this normjax and this jaxlib; None if it is."""
    if interface != INTERFACE:
        return f"has interface {interface}, expected {INTERFACE}"
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    own = tuple(
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1])  # type: ignore[index]
        for part in ("MAJOR", "MINOR")
    )
    # XLA supports kernels that were built for an older minor version.
    if version[0] != own[0] or version[1] > own[1]:
        built, running = (".".join(map(str, v)) for v in (version, own))
        return f"was built for version {built} of XLA's FFI, and this jaxlib has {running}"
    return None


def _call(name: str, results: list[Any], *operands: Array, **attributes: Any) -> list[Array]:
    """Calls a kernel, during lowering.

    `jax.ffi.ffi_call` requires all operands to vary along the same mapped axes, which matters for
    derivatives only, not during lowering.
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
