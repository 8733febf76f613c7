"""Linear maps of arrays of x's size, for tangents: what they keep, and how they are transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from normjax._core.lowering import by_platform
from normjax._core.platforms import PLATFORMS
from normjax._core.platforms.cpu import isolate

Function = Callable[..., Sequence[Array]]


def diagonal(function: Callable[..., Array], t: Array, *kept: Any, shape: Any = None) -> Array:
    """function(t, *kept) for a t broadcast to `shape`, by default its own.

    The function is elementwise and linear in t, of the dtype of t: a product or a selection. Its
    transpose computes anew from what is kept, x in its own dtype and vectors in the rank of x;
    autodiff of the product would keep the factor, x - mean for example, in float32.
    """
    leaves, structure = jax.tree.flatten(kept)
    (whole,) = broadcast_together(t.shape if shape is None else shape, [t], leaves)

    def flat(t: Array, *leaves: Any) -> list[Array]:
        return [function(t, *jax.tree.unflatten(structure, leaves))]

    return _linear([whole], leaves, flat, flat, [jax.typeof(whole)])[0]


def rounded_sum(shape: tuple[int, ...], dtype: np.dtype, *terms: Array, beside: Any = ()) -> Array:
    """The sum of `terms`, broadcast to `shape` and rounded once to `dtype`.

    It lies on the devices as the sum of the terms and of the arrays in `beside` would.

    Linear; its transpose gives each term a cotangent of its own to upcast. Autodiff of a sum that
    is then rounded would upcast the cotangent once, for all of them, and so in memory.
    """
    wholes = broadcast_together(shape, terms, jax.tree.leaves(beside))
    dtypes = [whole.dtype for whole in wholes]

    def rounded(*terms: Array) -> list[Array]:
        return [reduce(jnp.add, terms).astype(dtype)]

    def copies(cotangent: Array) -> list[Array]:
        own = isolate([cotangent] * len(dtypes))
        return [copy.astype(to) for copy, to in zip(own, dtypes, strict=True)]

    out = jax.typeof(wholes[0]).update(dtype=np.dtype(dtype), weak_type=False)
    return _linear(wholes, (), rounded, copies, [out])[0]


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
    wholes = list(terms)
    # Terms of one type go together, since a GPU sums two cotangents in one pass.
    for kind in {jax.typeof(v): None for v in terms if v.shape != shape}:
        which = [i for i, v in enumerate(terms) if jax.typeof(v) == kind]
        for i, whole in zip(which, _spread([terms[i] for i in which], shape, place), strict=True):
            wholes[i] = whole
    return wholes


def _spread(terms: Sequence[Array], shape: tuple[int, ...], place: Any) -> list[Array]:
    """Terms of one type broadcast to `shape`; the transpose sums as the platform sums best.

    The results lie at `place`. Broadcast without it a term would be on every device, and so would
    its whole cotangent be.
    """
    where = place if place is not None and any(place.spec) else None
    axes = tuple(a for a, n in enumerate(terms[0].shape) if n != shape[a])

    def broadcast(*terms: Array) -> list[Array]:
        return [jnp.broadcast_to(term, shape, out_sharding=where) for term in terms]

    def totals(*wholes: Array) -> list[Array]:
        return by_platform(lambda platform, *v: PLATFORMS[platform].totals(v, axes), *wholes)

    return _linear(terms, (), broadcast, totals)


def _linear(
    terms: Sequence[Array],
    kept: Sequence[Any],
    forward: Function,
    transposed: Function,
    types: Sequence[Any] | None = None,
) -> list[Array]:
    """`forward(*terms, *kept)`, linear in the terms, and `transposed(*cotangents, *kept)`.

    `types` are those of the results.
    """
    if types is None:
        types = jax.make_jaxpr(forward)(*terms, *kept).out_avals
    how = dict(number=len(terms), forward=forward, transposed=transposed, types=tuple(types))
    return _linear_p.bind(*terms, *kept, **how)


def _jvp(primals: Any, tangents: Any, *, number: int, forward: Function, **how: Any) -> Any:
    how |= dict(number=number, forward=forward)
    kept, d_kept = primals[number:], tangents[number:]
    results = []
    if not all(isinstance(d, ad.Zero) for d in tangents[:number]):
        d_terms = map(ad.instantiate_zeros, tangents[:number])
        results.append(_linear_p.bind(*d_terms, *kept, **how))
    moves = [not isinstance(d, ad.Zero) for d in d_kept]
    if any(moves):

        def of_moving(*moving: Array) -> Sequence[Array]:
            values = iter(moving)
            own = (next(values) if m else v for m, v in zip(moves, kept, strict=True))
            return forward(*primals[:number], *own)

        own, d_own = ([v for v, m in zip(vs, moves, strict=True) if m] for vs in (kept, d_kept))
        results.append(jax.jvp(of_moving, own, d_own)[1])
    return _linear_p.bind(*primals, **how), [
        reduce(jnp.add, vs) for vs in zip(*results, strict=True)
    ]


def _transpose(
    cotangents: Any, *operands: Any, number: int, forward: Function, transposed: Function, **_: Any
) -> list[Any]:
    terms, kept = operands[:number], operands[number:]
    types = [v.aval if ad.is_undefined_primal(v) else jax.typeof(v) for v in terms]
    own = [ad.instantiate_zeros(ct) for ct in cotangents]
    out = _linear(own, kept, transposed, forward, types)
    needed = [ad.is_undefined_primal(v) for v in terms]
    return [v if n else None for v, n in zip(out, needed, strict=True)] + [None] * len(kept)


def _batch(
    operands: Any, axes: Any, *, number: int, forward: Function, transposed: Function, **_: Any
) -> Any:
    # To full size: a term that all examples share would be given the cotangents of all.
    operands = [
        v if a is None else jnp.moveaxis(v, a, 0) for v, a in zip(operands, axes, strict=True)
    ]
    size = next(v.shape[0] for v, a in zip(operands, axes, strict=True) if a is not None)
    whole = [v[None] if a is None else v for v, a in zip(operands, axes, strict=True)]
    terms = [broadcast_together((size, *v.shape[1:]), [v], whole)[0] for v in whole[:number]]
    kept_axes = [None if a is None else 0 for a in axes[number:]]

    def batched(function: Function) -> Function:
        def mapped(*v: Array) -> Sequence[Array]:
            return jax.vmap(function, [0] * (len(v) - len(kept_axes)) + kept_axes)(*v)

        return mapped

    out = _linear(terms, operands[number:], batched(forward), batched(transposed))
    return out, [0] * len(out)


_linear_p = Primitive("linear")
_linear_p.multiple_results = True
_linear_p.def_impl(lambda *operands, forward, **_: forward(*operands))
_linear_p.def_abstract_eval(lambda *_, types, **__: types)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(
    _linear_p,
    mlir.lower_fun(lambda *operands, forward, **_: forward(*operands), multiple_results=True),
)
