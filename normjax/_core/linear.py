"""Linear maps of arrays of x's size, for tangents: what they keep, and how they are transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from normjax._core.platforms.cpu import between_kept, isolate, materialize


def diagonal(function: Callable[..., Array], t: Array, *kept: Any, shape: Any = None) -> Array:
    """function(t, *kept) for a t broadcast to `shape`, by default its own.

    The function is elementwise and linear in t, of the dtype of t: a product or a selection. Its
    transpose computes anew from what is kept, x in its own dtype and vectors in the rank of x;
    autodiff of the product would keep the factor, x - mean for example, in float32.
    """
    leaves, structure = jax.tree.flatten(kept)
    (whole,) = broadcast_together(t.shape if shape is None else shape, [t], leaves)

    def flat(t: Array, *leaves: Any) -> Array:
        return function(t, *jax.tree.unflatten(structure, leaves))

    return _diagonal_p.bind(whole, *leaves, function=flat)


def rounded_sum(shape: tuple[int, ...], dtype: np.dtype, *terms: Array, beside: Any = ()) -> Array:
    """The sum of `terms`, broadcast to `shape` and rounded once to `dtype`.

    It lies on the devices as the sum of the terms and of the arrays in `beside` would.

    Linear; its transpose gives each term a cotangent of its own to make wide. Autodiff of a sum
    that is then rounded would make the cotangent wide once, for all of them, and so in memory.
    """
    wholes = broadcast_together(shape, terms, jax.tree.leaves(beside))
    return _rounded_sum_p.bind(*wholes, dtype=np.dtype(dtype))


def broadcast_together(
    shape: tuple[int, ...], terms: Sequence[Array], beside: Sequence[Any] = ()
) -> list[Array]:
    """The terms broadcast to `shape`, of the type that they and what is `beside` have together.

    A type says how an array lies on the axes of a mesh, and along which of them it varies. All are
    of the rank of `shape`.
    """
    first, place = terms[0].dtype, None
    types = (jax.typeof(v) for v in (*terms, *beside))
    if len({t.update(shape=shape, dtype=first, weak_type=False) for t in types}) > 1:
        # The zeros are never computed. A term varies along an axis before it is broadcast, since
        # the transpose sums over the devices of that axis.
        nil = reduce(jnp.add, (jnp.zeros_like(v, first) for v in (*terms, *beside)))
        place = jax.typeof(nil).sharding
        point = (1,) * len(shape)
        nil = reduce(jnp.add, (jnp.zeros_like(v, first, point) for v in (*terms, *beside)))
        terms = [term + nil.astype(term.dtype) for term in terms]
    return [_spread(term, shape, place) for term in terms]


def _spread(term: Array, shape: tuple[int, ...], place: Any) -> Array:
    """`term` broadcast to `shape` in such steps that the transpose sums as a CPU sums best.

    The result lies at `place`. Broadcast without it the term would be on every device, and so
    would its whole cotangent be.
    """

    def broadcast(term: Array, shape: tuple[int, ...]) -> Array:
        if place is None or not any(place.spec):
            return jnp.broadcast_to(term, shape)
        spec = (None if n == 1 else axis for n, axis in zip(shape, place.spec, strict=True))
        return jnp.broadcast_to(term, shape, out_sharding=place.update(spec=PartitionSpec(*spec)))

    axes = tuple(a for a, n in enumerate(jnp.shape(term)) if n != shape[a])
    if between_kept(axes, len(shape)):
        row = tuple(1 if a == max(axes) else n for a, n in enumerate(shape))
        term = materialize(broadcast(term, row))
    return broadcast(term, shape)


def _rounded_sum(*terms: Array, dtype: np.dtype) -> Array:
    return reduce(jnp.add, terms).astype(dtype)


def _transposed_sum(cotangent: Any, *terms: Any, dtype: np.dtype) -> list[Any]:
    linear = [ad.is_undefined_primal(term) for term in terms]
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(terms[i].aval) if linear[i] else None for i in range(len(terms))]
    copies = isolate([cotangent] * len(terms))
    return [copies[i].astype(terms[i].aval.dtype) if linear[i] else None for i in range(len(terms))]


def _rounded_sum_batched(terms: Any, axes: Any, **how: Any) -> Any:
    # To full size: a term of one example for all would be given the cotangents of all.
    terms = _in_front(terms, axes)
    shape = jnp.broadcast_shapes(*(term.shape for term in terms))
    return _rounded_sum_p.bind(*broadcast_together(shape, terms), **how), 0


def _in_front(values: Any, axes: Any) -> list[Array]:
    """The batch axis first, of size 1 where there is none."""
    pairs = zip(values, axes, strict=True)
    return [v[None] if a is None else jnp.moveaxis(v, a, 0) for v, a in pairs]


_rounded_sum_p = Primitive("rounded_sum")
_rounded_sum_p.def_impl(_rounded_sum)
_rounded_sum_p.def_abstract_eval(lambda first, *_, dtype: first.update(dtype=dtype))
ad.deflinear2(_rounded_sum_p, _transposed_sum)
batching.primitive_batchers[_rounded_sum_p] = _rounded_sum_batched
mlir.register_lowering(_rounded_sum_p, mlir.lower_fun(_rounded_sum, multiple_results=False))


def _diagonal_jvp(primals: Any, tangents: Any, *, function: Callable[..., Array]) -> Any:
    t, *kept = primals
    dt, *d_kept = tangents
    moves = [not isinstance(d, ad.Zero) for d in d_kept]
    terms = [] if isinstance(dt, ad.Zero) else [_diagonal_p.bind(dt, *kept, function=function)]
    if any(moves):

        def of_moving(*moving: Array) -> Array:
            values = iter(moving)
            return function(
                t, *(next(values) if m else v for m, v in zip(moves, kept, strict=True))
            )

        own, d_own = ([v for v, m in zip(vs, moves, strict=True) if m] for vs in (kept, d_kept))
        terms.append(jax.jvp(of_moving, own, d_own)[1])
    return _diagonal_p.bind(*primals, function=function), reduce(jnp.add, terms)


def _diagonal_transposed(cotangent: Any, t: Any, *kept: Any, **how: Any) -> list[Any]:
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(t.aval), *(None for _ in kept)]
    return [_diagonal_p.bind(cotangent, *kept, **how), *(None for _ in kept)]


def _diagonal_batched(operands: Any, axes: Any, **how: Any) -> Any:
    t, *kept = _in_front(operands, axes)
    shape = jnp.broadcast_shapes(t.shape, *((v.shape[0], *(1,) * (t.ndim - 1)) for v in kept))
    return _diagonal_p.bind(*broadcast_together(shape, [t], kept), *kept, **how), 0


_diagonal_p = Primitive("diagonal")
_diagonal_p.def_impl(lambda *operands, function: function(*operands))
_diagonal_p.def_abstract_eval(lambda t, *_, function: t)
ad.primitive_jvps[_diagonal_p] = _diagonal_jvp
ad.primitive_transposes[_diagonal_p] = _diagonal_transposed
batching.primitive_batchers[_diagonal_p] = _diagonal_batched
mlir.register_lowering(
    _diagonal_p,
    mlir.lower_fun(lambda *operands, function: function(*operands), multiple_results=False),
)
