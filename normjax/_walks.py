"""Walks through large arrays: what is written to memory by them, and what is kept for later.

XLA's CPU compiler fuses into a sum whatever that sum alone consumes, and writes to memory what a
second consumer shares: x - mean in float32, a half precision x made wide, a vector broadcast to
the shape of x. A step of layer norm took 2 to 4 times as long so and 75 MB instead of 0.1
(benchmarks/results/speed.md). `apart` and `rounded_sum` keep consumers apart, `diagonal` keeps
little for the backward pass, and two names tell a checkpoint policy what a norm depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

_INPUT, _MOMENTS = "normjax.input", "normjax.moments"

_named = jax.checkpoint_policies.save_only_these_names(_INPUT, _MOMENTS)


def norm_inputs_saveable(primitive: Any, *values: Any, **params: Any) -> Any:
    """A policy for `jax.checkpoint` and `nn.remat`: keep what goes into norms, and their moments.

        nn.remat(Block, policy=normjax.norm_inputs_saveable)

    Of convolution, norm and activation the convolution's output is kept; the backward pass
    normalizes and activates it anew, which is elementwise, and convolves and measures nothing
    twice. For any activation and any norm of this library. It pays where activations fill the
    memory.

    Args:
        primitive, values, params: what JAX asks a policy about.

    Returns:
        Whether the value is kept.

    Guarantees:
        same result: loss and gradients are those without the policy.
        nothing twice: no statistic is measured or shared over devices in the backward pass.

    Raises:
        Nothing.

    References:
        Chen, Xu, Zhang, Guestrin (2016), Training Deep Nets with Sublinear Memory Cost,
        arXiv:1604.06174.

    Example:
        >>> import jax, jax.numpy as jnp, normjax
        >>> def block(x):
        ...     return jax.nn.gelu(normjax.layer_norm(jnp.sin(x)))
        >>> lean = jax.checkpoint(block, policy=normjax.norm_inputs_saveable)
        >>> lean(jnp.array([0.0, 1.0])).round(2)
        Array([-0.16,  0.84], dtype=float32)
    """
    return _named(primitive, *values, **params)


def input_of_norm(x: Array) -> Array:
    """x, under the name by which `norm_inputs_saveable` knows it."""
    return checkpoint_name(x, _INPUT)


def moments_of_norm(moments: Any) -> Any:
    """moments, under the name by which `norm_inputs_saveable` knows them."""

    def named(leaf: Any) -> Any:
        # A count that is a constant is known in any case.
        return checkpoint_name(leaf, _MOMENTS) if isinstance(leaf, Array) else leaf

    return jax.tree.map(named, moments)


def apart(operands: Any, walk: int = 1) -> Any:
    """A tree of operands as it is, for one walk; no other walk shares what is computed of it.

    A barrier on the CPU. Elsewhere nothing: on a GPU sums of one operand are best fused, which a
    barrier would forbid. Calls with equal operands count as one, so walks over the same arrays
    take their copies in one call, beside other operands that they use, or with another number.
    """
    leaves, structure = jax.tree.flatten(operands)
    return jax.tree.unflatten(structure, _apart_p.bind(*leaves, walk=walk))


def summed(x: Array, axes: tuple[int, ...]) -> Array:
    """sum(x) over `axes`, which stay with size 1.

    Between axes that are kept, as in instance norm, XLA's CPU compiler takes up to 1.8 times as
    long for one sum over two axes as for a sum over the last and then one over what is left.
    """
    if _in_two_steps(axes, x.ndim):
        x = apart(jnp.sum(x, max(axes), keepdims=True))
    return jnp.sum(x, axes, keepdims=True)


def _in_two_steps(axes: tuple[int, ...], rank: int) -> bool:
    return len(axes) > 1 and 0 not in axes and max(axes) < rank - 1


def written(vector: Array) -> Array:
    """A vector as it is, and in memory before a walk reads it; so is the cotangent of it.

    On the CPU. XLA fuses a cheap vector into the walk over x that broadcasts it, and computes it
    anew at every entry. Where that takes a division of indices, as from groups to features, the
    loop no longer vectorizes: a step of group norm in bfloat16 took 3 times as long. It does not
    fuse what it takes for expensive, for example a division; so this divides by a hidden one.
    """
    return _written_p.bind(vector)


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
    """`term` broadcast to `shape` in such steps that the transpose sums as `summed` does.

    The result lies at `place`. Broadcast without it the term would be on every device, and so
    would its whole cotangent be.
    """

    def broadcast(term: Array, shape: tuple[int, ...]) -> Array:
        if place is None or not any(place.spec):
            return jnp.broadcast_to(term, shape)
        spec = (None if n == 1 else axis for n, axis in zip(shape, place.spec, strict=True))
        return jnp.broadcast_to(term, shape, out_sharding=place.update(spec=PartitionSpec(*spec)))

    axes = tuple(a for a, n in enumerate(jnp.shape(term)) if n != shape[a])
    if _in_two_steps(axes, len(shape)):
        row = tuple(1 if a == max(axes) else n for a, n in enumerate(shape))
        term = written(broadcast(term, row))
    return broadcast(term, shape)


def _rounded_sum(*terms: Array, dtype: np.dtype) -> Array:
    return reduce(jnp.add, terms).astype(dtype)


def _transposed_sum(cotangent: Any, *terms: Any, dtype: np.dtype) -> list[Any]:
    linear = [ad.is_undefined_primal(term) for term in terms]
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(terms[i].aval) if linear[i] else None for i in range(len(terms))]
    copies = apart([cotangent] * len(terms))
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


def _written_transposed(cotangent: Any, vector: Any) -> list[Any]:
    return [cotangent if isinstance(cotangent, ad.Zero) else written(cotangent)]


def _divided_by_one(vector: Array) -> Array:
    if jnp.iscomplexobj(vector):
        return lax.complex(_divided_by_one(vector.real), _divided_by_one(vector.imag))
    # Clamped at infinity, which changes nothing: no sum that runs as a library call takes it in.
    end = jnp.full_like(vector, jnp.inf, shape=())
    # Of full shape, since a division by a broadcast number becomes a product.
    ones = lax.optimization_barrier(jnp.ones_like(vector))
    return lax.clamp(-end, vector, end) / ones


_written_p = Primitive("written")
_written_p.def_impl(lambda vector: vector)
_written_p.def_abstract_eval(lambda vector: vector)
ad.deflinear2(_written_p, _written_transposed)
batching.primitive_batchers[_written_p] = lambda vs, axes: (_written_p.bind(*vs), *axes)
mlir.register_lowering(_written_p, lambda context, vector: [vector])
mlir.register_lowering(
    _written_p, mlir.lower_fun(_divided_by_one, multiple_results=False), platform="cpu"
)


def _barriers(context: Any, *operands: Any, walk: int) -> Any:
    # XLA merges equal barriers and drops operands that nobody uses; a barrier behind a barrier is
    # another one.
    copies: Any = operands
    for _ in range(walk):
        copies = stablehlo.OptimizationBarrierOp(copies).results
    return copies


_apart_p = Primitive("apart")
_apart_p.multiple_results = True
_apart_p.def_impl(lambda *operands, walk: operands)
_apart_p.def_abstract_eval(lambda *operands, walk: operands)
ad.primitive_jvps[_apart_p] = lambda primals, tangents, walk: (
    _apart_p.bind(*primals, walk=walk),
    tangents,
)
batching.primitive_batchers[_apart_p] = lambda operands, axes, walk: (
    _apart_p.bind(*operands, walk=walk),
    axes,
)
mlir.register_lowering(_apart_p, lambda context, *operands, walk: operands)
mlir.register_lowering(_apart_p, _barriers, platform="cpu")
