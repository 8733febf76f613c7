"""A CPU: two passes over x, and what keeps XLA's compiler from fusing them badly.

It fuses into a sum whatever that sum alone consumes, and writes to memory what a second consumer
shares: x - mean in float32, a half precision x upcast, a vector broadcast to the shape of x. A
step of layer norm took 2 to 4 times as long so and 75 MB instead of 0.1
(benchmarks/results/speed.md). `isolate` keeps consumers separate, `materialize` computes a vector
once. On other platforms both are the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir

from normjax._core.dtypes import HALF, abs_square, accumulation_dtype
from normjax._core.lowering import lowered_as
from normjax._core.mask import Count, deviation, safe_count, select


def measure(
    x: Array, mask: Array | None, count: Count, *, axes: tuple[int, ...], centered: bool, kept: bool
) -> tuple[Array, Array]:
    """mean and m2 by the corrected two-pass algorithm; `kept` if a derivative reads them again.

    Sums around what a first sum found mend what that lost by rounding. It makes constants exact,
    and no choice of data can break it, as one can break a pivot that is taken from a part of x.
    """
    dtype, divisor = accumulation_dtype(x.dtype), safe_count(count)
    total = partial(summed, axes=axes)
    half = x.dtype in HALF
    # Alone, a sum over what lies in one piece fuses into one pass with all that follows.
    fused = not kept and not half and axes == tuple(range(1, x.ndim))[-len(axes) :]
    once = (x if fused else isolate(x)).astype(dtype)
    if not centered:
        m2 = total(abs_square(select(once, mask)))
        return jnp.zeros_like(m2, dtype), m2
    rough = total(select(once, mask)) / divisor.astype(dtype)
    # Half precision is spared one sum: rounded to the dtype of x, the pivot lies on one grid with
    # x, where (mean - pivot)^2 <= var, and a constant is its own pivot.
    info = jnp.finfo(x.dtype)
    pivot = lax.reduce_precision(rough, info.nexp, info.nmant) if half else rough
    passes = (x, pivot, x, pivot)
    first, center, second, middle = passes if fused else isolate(passes)
    squares = total(abs_square(deviation(second.astype(dtype), middle, mask)))
    if half:
        rest = jnp.where(squares > 0, rough - pivot, jnp.zeros((), dtype))
    else:
        rest = total(deviation(first.astype(dtype), center, mask)) / divisor.astype(dtype)
    m2 = jnp.maximum(squares - abs_square(rest) * divisor, 0)
    # Beyond the range of the dtype it is infinite, and not the difference of two infinities.
    return pivot + rest, jnp.where(jnp.isfinite(squares), m2, squares)


def totals(arrays: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
    """Of each its sum over `axes`, which stay with size 1."""
    return [summed(x, axes) for x in arrays]


def summed(x: Array, axes: tuple[int, ...]) -> Array:
    """sum(x) over `axes`, which stay with size 1.

    Between axes that are kept, as in instance norm, XLA's CPU compiler takes up to 1.8 times as
    long for one sum over two axes as for a sum over the last and then one over what is left.
    """
    if between_kept(axes, x.ndim):
        x = isolate(jnp.sum(x, max(axes), keepdims=True))
    return jnp.sum(x, axes, keepdims=True)


def between_kept(axes: tuple[int, ...], rank: int) -> bool:
    """Whether several axes are reduced between an axis that is kept before and one behind."""
    return len(axes) > 1 and 0 not in axes and max(axes) < rank - 1


def isolate(operands: Any, number: int = 1) -> Any:
    """A tree of operands as it is, for one pass over memory; no other shares what it computes.

    A barrier on the CPU. Elsewhere nothing: on a GPU sums of one operand are best fused, which a
    barrier would forbid. Calls with equal operands count as one, so passes over the same arrays
    take their copies in one call, beside other operands that they use, or with another number.
    """
    leaves, structure = jax.tree.flatten(operands)
    return jax.tree.unflatten(structure, _isolate_p.bind(*leaves, number=number))


def materialize(vector: Array) -> Array:
    """A vector as it is, and in memory before a pass over x reads it; so is the cotangent of it.

    On the CPU. XLA fuses a cheap vector into the pass over x that broadcasts it, and computes it
    again at every entry. Where that takes a division of indices, as from groups to features, the
    loop no longer vectorizes: a step of group norm in bfloat16 took 3 times as long. It does not
    fuse what it takes for expensive, for example a division; so this divides by a hidden one.
    """
    return _materialize_p.bind(vector)


def _materialize_transposed(cotangent: Any, vector: Any) -> list[Any]:
    return [cotangent if isinstance(cotangent, ad.Zero) else materialize(cotangent)]


def _divided_by_one(vector: Array) -> Array:
    if lowered_as("cpu") != "cpu":
        return vector
    if jnp.iscomplexobj(vector):
        return lax.complex(_divided_by_one(vector.real), _divided_by_one(vector.imag))
    # Clamped at infinity, which changes nothing: no sum that runs as a library call takes it in.
    end = jnp.full_like(vector, jnp.inf, shape=())
    # Of full shape, since a division by a broadcast number becomes a product.
    ones = lax.optimization_barrier(jnp.ones_like(vector))
    return lax.clamp(-end, vector, end) / ones


_materialize_p = Primitive("materialize")
_materialize_p.def_impl(lambda vector: vector)
_materialize_p.def_abstract_eval(lambda vector: vector)
ad.deflinear2(_materialize_p, _materialize_transposed)
batching.primitive_batchers[_materialize_p] = lambda vs, axes: (_materialize_p.bind(*vs), *axes)
mlir.register_lowering(_materialize_p, lambda context, vector: [vector])
mlir.register_lowering(
    _materialize_p, mlir.lower_fun(_divided_by_one, multiple_results=False), platform="cpu"
)


def _barriers(context: Any, *operands: Any, number: int) -> Any:
    # XLA merges equal barriers and drops operands that nobody uses; a barrier behind a barrier is
    # another one.
    copies: Any = operands
    for _ in range(number if lowered_as("cpu") == "cpu" else 0):
        copies = stablehlo.OptimizationBarrierOp(copies).results
    return copies


_isolate_p = Primitive("isolate")
_isolate_p.multiple_results = True
_isolate_p.def_impl(lambda *operands, number: operands)
_isolate_p.def_abstract_eval(lambda *operands, number: operands)
ad.primitive_jvps[_isolate_p] = lambda primals, tangents, number: (
    _isolate_p.bind(*primals, number=number),
    tangents,
)
batching.primitive_batchers[_isolate_p] = lambda operands, axes, number: (
    _isolate_p.bind(*operands, number=number),
    axes,
)
mlir.register_lowering(_isolate_p, lambda context, *operands, number: operands)
mlir.register_lowering(_isolate_p, _barriers, platform="cpu")
