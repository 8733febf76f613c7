"""Linear maps of arrays of the size of x, for tangents, with chosen residuals and transposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normjax._core.lowering import KERNELS, by_platform, tangents_of, without_kernels
from normjax._core.mask import deviation, select_finite
from normjax._core.platforms import PLATFORMS, gpu

Function = Callable[..., Sequence[Array]]


# Not a NamedTuple, since some versions of JAX hold functions by weak references.
@dataclass(frozen=True)
class Map:
    """A linear map of some terms; further operands are kept for its transpose.

    Attributes:
        plain: linear in the terms, and differentiable in the kept operands.
        lowered: `lowered(platform, *operands)`, the same in the best form of a platform. Or None.
    """

    plain: Function
    lowered: Function | None = None

    def __call__(self, *operands: Any, types: Any) -> Sequence[Array]:
        if self.lowered is None:
            return self.plain(*operands)
        return by_platform(self.lowered, *operands, types=types)

    def batched(self, kept: Sequence[int | None]) -> Map:
        """Maps over the first axis of all terms, and over the axes `kept` of the kept operands."""

        def mapped(function: Function, *operands: Any) -> Sequence[Array]:
            return jax.vmap(function, [0] * (len(operands) - len(kept)) + [*kept])(*operands)

        lowered = self.lowered
        return Map(
            partial(mapped, self.plain),
            lowered
            and (lambda platform, *v: mapped(partial(lowered, without_kernels(platform)), *v)),
        )


def diagonal(function: Callable[..., Array], t: Array, *kept: Any, shape: Any = None) -> Array:
    """function(t, *kept) for a t broadcast to `shape`, by default its own.

    The function is elementwise and linear in t, of the dtype of t: a product or a selection. Its
    transpose recomputes it from the kept operands: x in its own dtype and vectors in the rank of x.
    Autodiff of the product would keep the factor, x - mean for example, in float32.
    """
    leaves, structure = jax.tree.flatten(kept)
    (whole,) = broadcast_together(t.shape if shape is None else shape, [t], leaves)

    def flat(t: Array, *leaves: Any) -> list[Array]:
        return [function(t, *jax.tree.unflatten(structure, leaves))]

    return _linear([whole], leaves, Map(flat), Map(flat), [jax.typeof(whole)])[0]


def rounded_sum(shape: tuple[int, ...], dtype: np.dtype, *terms: Array, others: Any = ()) -> Array:
    """The sum of `terms`, broadcast to `shape` and rounded once to `dtype`.

    Its sharding is that of the sum of the terms and the arrays in `others`.

    Linear; its transpose upcasts the cotangent once for each term. Autodiff of a sum that is then
    rounded would upcast it once for all terms, and so write the upcast cotangent to memory.
    """
    wholes = broadcast_together(shape, terms, jax.tree.leaves(others))
    dtypes = [whole.dtype for whole in wholes]

    def rounded(*terms: Array) -> list[Array]:
        return [reduce(jnp.add, terms).astype(dtype)]

    def copies(cotangent: Array) -> list[Array]:
        return [cotangent.astype(to) for to in dtypes]

    out = jax.typeof(wholes[0]).update(dtype=np.dtype(dtype), weak_type=False)
    return _linear(wholes, (), Map(rounded), Map(copies), [out])[0]


def broadcast_together(
    shape: tuple[int, ...], terms: Sequence[Array], others: Sequence[Any] = ()
) -> list[Array]:
    """The terms broadcast to `shape`, with the common type of the terms and `others`.

    A type has the sharding of an array on a mesh, and the axes along which it varies. All have the
    rank of `shape`.
    """
    terms, place = _placed(shape, terms, others)
    wholes = list(terms)
    # Terms of one type are broadcast together, since a GPU sums two cotangents in one pass.
    for kind in {jax.typeof(v): None for v in terms if v.shape != shape}:
        which = [i for i, v in enumerate(terms) if jax.typeof(v) == kind]
        own = _broadcast([terms[i] for i in which], shape, place)
        for i, whole in zip(which, own, strict=True):
            wholes[i] = whole
    return wholes


def line(
    a: Array, b: Array, x: Array, mask: Array | None, center: Array, others: Any
) -> list[Array]:
    """a and b (x - center), of the shape of x. Masked entries of x that are not finite count as 0.

    Linear in a and b, which are of one dtype. The transpose of t and u is sum(t) and
    sum(u (x - center)) over the axes along which a and b are broadcast.
    """
    a, b = jnp.broadcast_arrays(a, b)
    kept, structure = jax.tree.flatten((x, mask, center))
    (a, b), place = _placed(x.shape, [a, b], [*kept, *jax.tree.leaves(others)])
    shape, axes = x.shape, _reduced(a.shape, x.shape)

    def both(a: Array, b: Array, *leaves: Any) -> list[Array]:
        a, b = (jnp.broadcast_to(v, shape, out_sharding=place) for v in (a, b))
        return [a, deviated(b, *jax.tree.unflatten(structure, leaves))]

    def sums(t: Array, u: Array, *leaves: Any) -> list[Array]:
        u = deviated(u, *jax.tree.unflatten(structure, leaves))
        return [jnp.sum(v, axes, keepdims=True) for v in (t, u)]

    def lowered(platform: str, t: Array, u: Array, *leaves: Any) -> Sequence[Array]:
        x, mask, center = jax.tree.unflatten(structure, leaves)
        if platform == "gpu" and mask is None and gpu.are_rows(x, axes):
            return gpu.sums_of_rows(t, u, x, center, axes)
        return PLATFORMS[platform].totals((t, deviated(u, x, mask, center)), axes)

    return _linear([a, b], kept, Map(both), Map(sums, lowered))


def norm_tangent(
    plain: Callable[..., Array], terms: Sequence[Array], kept: Sequence[Array], kernel: Function
) -> Array:
    """plain(*terms, *kept), linear in the terms, which have the rank of the kept operands.

    The transpose is that of `plain`, or `kernel(cotangent, *kept)` where kernels may be called.
    """
    terms, _ = _placed(kept[0].shape, terms, kept)
    types = [jax.typeof(t) for t in terms]

    def forward(*operands: Array) -> list[Array]:
        return [plain(*operands)]

    def transposed(cotangent: Array, *kept: Array) -> Sequence[Array]:
        zeros = [ad.instantiate_zeros(ad.Zero(t)) for t in types]
        return jax.vjp(lambda *terms: plain(*terms, *kept), *zeros)[1](cotangent)

    def lowered(platform: str, cotangent: Array, *kept: Array) -> Sequence[Array]:
        return (kernel if platform == KERNELS else transposed)(cotangent, *kept)

    return _linear(list(terms), kept, Map(forward), Map(transposed, lowered))[0]


def deviated(t: Array, x: Array, mask: Array | None, center: Array | None) -> Array:
    """t (x - center) in the dtype of t. Masked entries of x that are not finite count as 0."""
    return deviation(select_finite(x, x, mask).astype(t.dtype), center) * t


def _placed(
    shape: tuple[int, ...], terms: Sequence[Array], others: Sequence[Any]
) -> tuple[Sequence[Array], Any]:
    """The terms, varying along the axes of all arrays, and the sharding of their broadcast.

    Without that sharding a broadcast term and its cotangent would be replicated on all devices.
    """
    first = terms[0].dtype
    types = (jax.typeof(v) for v in (*terms, *others))
    if len({t.update(shape=shape, dtype=first, weak_type=False) for t in types}) == 1:
        return terms, None
    # The zeros are never computed. A term varies along an axis before it is broadcast, since the
    # transpose sums over the devices of that axis.
    nil = reduce(jnp.add, (jnp.zeros_like(v, first) for v in (*terms, *others)))
    place = jax.typeof(nil).sharding
    point = (1,) * len(shape)
    nil = reduce(jnp.add, (jnp.zeros_like(v, first, point) for v in (*terms, *others)))
    return [term + nil.astype(term.dtype) for term in terms], place if any(place.spec) else None


def _broadcast(terms: Sequence[Array], shape: tuple[int, ...], place: Any) -> list[Array]:
    """Broadcasts terms of one type; the transpose sums in the best form of the platform."""
    axes = _reduced(terms[0].shape, shape)

    def broadcast(*terms: Array) -> list[Array]:
        return [jnp.broadcast_to(term, shape, out_sharding=place) for term in terms]

    def sums(*wholes: Array) -> list[Array]:
        return [jnp.sum(v, axes, keepdims=True) for v in wholes]

    def lowered(platform: str, *wholes: Array) -> Sequence[Array]:
        return PLATFORMS[platform].totals(wholes, axes)

    return _linear(terms, (), Map(broadcast), Map(sums, lowered))


def _reduced(small: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes along which an array of the one shape is broadcast to the other."""
    return tuple(a for a, n in enumerate(small) if n != shape[a])


def _linear(
    terms: Sequence[Array],
    kept: Sequence[Any],
    forward: Map,
    transposed: Map,
    types: Sequence[Any] | None = None,
) -> list[Array]:
    """`forward(*terms, *kept)`, whose transpose is `transposed(*cotangents, *kept)`.

    `types` are those of the results.
    """
    if types is None:
        types = jax.make_jaxpr(forward.plain)(*terms, *kept).out_avals
    how = dict(number=len(terms), forward=forward, transposed=transposed, types=tuple(types))
    return _linear_p.bind(*terms, *kept, **how)


def _jvp(primals: Any, tangents: Any, *, number: int, forward: Map, **how: Any) -> Any:
    how |= dict(number=number, forward=forward)
    kept, d_kept = primals[number:], tangents[number:]
    results = []
    if not all(isinstance(d, ad.Zero) for d in tangents[:number]):
        d_terms = map(ad.instantiate_zeros, tangents[:number])
        results.append(_linear_p.bind(*d_terms, *kept, **how))
    if not all(isinstance(d, ad.Zero) for d in d_kept):
        results.append(tangents_of(partial(forward.plain, *primals[:number]), kept, d_kept))
    return _linear_p.bind(*primals, **how), [
        reduce(jnp.add, vs) for vs in zip(*results, strict=True)
    ]


def _transpose(
    cotangents: Any, *operands: Any, number: int, forward: Map, transposed: Map, **_: Any
) -> list[Any]:
    terms, kept = operands[:number], operands[number:]
    types = [v.aval if ad.is_undefined_primal(v) else jax.typeof(v) for v in terms]
    own = [ad.instantiate_zeros(ct) for ct in cotangents]
    out = _linear(own, kept, transposed, forward, types)
    needed = [ad.is_undefined_primal(v) for v in terms]
    return [v if n else None for v, n in zip(out, needed, strict=True)] + [None] * len(kept)


def _batch(
    operands: Any, axes: Any, *, number: int, forward: Map, transposed: Map, **_: Any
) -> Any:
    # Unbatched terms are broadcast, since the transpose returns a cotangent for each example.
    operands = [
        v if a is None else jnp.moveaxis(v, a, 0) for v, a in zip(operands, axes, strict=True)
    ]
    # Zeros with the sharding and the varying axes of the examples.
    examples = [v for v, a in zip(operands, axes, strict=True) if a is not None]
    nil = reduce(jnp.add, (jnp.sum(jnp.zeros_like(v, float), range(1, v.ndim)) for v in examples))
    terms = [
        v if a is not None else v[None] + nil.reshape(-1, *(1,) * v.ndim).astype(v.dtype)
        for v, a in zip(operands[:number], axes, strict=False)
    ]
    kept = [None if a is None else 0 for a in axes[number:]]
    out = _linear(terms, operands[number:], forward.batched(kept), transposed.batched(kept))
    return out, [0] * len(out)


_linear_p = Primitive("linear")
_linear_p.multiple_results = True
_linear_p.def_impl(lambda *operands, forward, types, **_: forward(*operands, types=types))
_linear_p.def_abstract_eval(lambda *_, types, **__: types)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(
    _linear_p,
    mlir.lower_fun(
        lambda *operands, forward, types, **_: forward(*operands, types=types),
        multiple_results=True,
    ),
)
