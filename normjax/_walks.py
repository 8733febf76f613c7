"""Walks through large arrays: what is written to memory by them, and what is kept for later.

XLA's CPU compiler fuses into a sum whatever that sum alone consumes, and writes to memory whatever a
second consumer shares: x - mean in float32, a half precision x made wide, a vector broadcast to
the shape of x. A step of layer norm took 2 to 4 times as long so and 75 MB instead of 0.1
(benchmarks/results/speed.md). Two operations of this room keep consumers apart; two names tell
a checkpoint policy what a norm cannot do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

_INPUT, _MOMENTS = "normjax.input", "normjax.moments"

norm_inputs_saveable = jax.checkpoint_policies.save_only_these_names(_INPUT, _MOMENTS)
"""A policy for `jax.checkpoint` and `nn.remat`: keep what goes into a norm, and its moments.

Of convolution, norm and activation one tensor is kept instead of two or three; the backward pass
normalizes and activates anew, which is elementwise, and convolves and measures nothing twice. It
serves any activation and any norm of this library.

Example:
    >>> import jax, jax.numpy as jnp, normjax
    >>> def block(x):
    ...     return jax.nn.gelu(normjax.layer_norm(jnp.sin(x)))
    >>> lean = jax.checkpoint(block, policy=normjax.norm_inputs_saveable)
    >>> bool(jnp.allclose(jax.grad(lambda x: lean(x).sum())(jnp.arange(4.0)),
    ...                   jax.grad(lambda x: block(x).sum())(jnp.arange(4.0))))
    True
"""


def input_of_norm(x: Array) -> Array:
    """x, under the name by which `norm_inputs_saveable` knows it."""
    return checkpoint_name(x, _INPUT)


def moments_of_norm(moments: Any) -> Any:
    """moments, under the name by which `norm_inputs_saveable` knows them."""
    return checkpoint_name(moments, _MOMENTS)


def apart(*operands: ArrayLike) -> Sequence[Any]:
    """The operands as they are, for one walk; no other walk shares what is computed of them.

    A barrier on the CPU. Elsewhere nothing: on a GPU sums of one operand are best fused, which a
    barrier would forbid. Calls with equal operands count as one, so walks over the same arrays
    take their copies in one call or beside other operands.
    """
    return _apart_p.bind(*map(jnp.asarray, operands))


def rounded_sum(shape: tuple[int, ...], dtype: np.dtype, *terms: Array) -> Array:
    """The sum of `terms`, broadcast to `shape` and rounded once to `dtype`.

    Linear; its transpose gives each term a cotangent of its own to make wide. Autodiff of a sum
    that is then rounded would make the cotangent wide once, for all of them, and so in memory.
    """
    # Added zeros change the types alone by which meshes and devices tell arrays apart; that of
    # devices while a vector is a vector, because its transpose is a sum over devices.
    point = (1,) * len(shape)
    alike = reduce(jnp.add, (jnp.zeros_like(term, shape=point) for term in terms))
    wholes = [jnp.broadcast_to(term + alike, shape) for term in terms]
    alike = reduce(jnp.add, map(jnp.zeros_like, wholes))
    return _rounded_sum_p.bind(*(whole + alike for whole in wholes), dtype=np.dtype(dtype))


def _rounded_sum(*terms: Array, dtype: np.dtype) -> Array:
    return reduce(jnp.add, terms).astype(dtype)


def _transposed_sum(cotangent: Any, *terms: Any, dtype: np.dtype) -> list[Any]:
    linear = [ad.is_undefined_primal(term) for term in terms]
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(terms[i].aval) if linear[i] else None for i in range(len(terms))]
    copies = apart(*[cotangent] * len(terms))
    return [copies[i].astype(terms[i].aval.dtype) if linear[i] else None for i in range(len(terms))]


_rounded_sum_p = Primitive("rounded_sum")
_rounded_sum_p.def_impl(_rounded_sum)
_rounded_sum_p.def_abstract_eval(lambda first, *_, dtype: first.update(dtype=dtype))
ad.deflinear2(_rounded_sum_p, _transposed_sum)
batching.defbroadcasting(_rounded_sum_p)
mlir.register_lowering(_rounded_sum_p, mlir.lower_fun(_rounded_sum, multiple_results=False))

_apart_p = Primitive("apart")
_apart_p.multiple_results = True
_apart_p.def_impl(lambda *operands: operands)
_apart_p.def_abstract_eval(lambda *operands: operands)
ad.primitive_jvps[_apart_p] = lambda primals, tangents: (_apart_p.bind(*primals), tangents)
batching.primitive_batchers[_apart_p] = lambda operands, axes: (_apart_p.bind(*operands), axes)
mlir.register_lowering(_apart_p, lambda context, *operands: operands)
mlir.register_lowering(
    _apart_p,
    mlir.lower_fun(lambda *operands: lax.optimization_barrier(operands), multiple_results=True),
    platform="cpu",
)
