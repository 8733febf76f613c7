"""Platform-dependent functions in one traced program: the platform is known at lowering."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# JAX 0.7 needs no mesh at lowering and lacks this function.
_use_mesh: Any = getattr(jax.sharding, "use_abstract_mesh", nullcontext)

PLATFORMS = ("cpu", "gpu", "tpu")
# A CPU on which the kernels of normjax-cpu may be called.
KERNELS = "kernels"
CPU = ("cpu", KERNELS)
VARIABLE = "NORMJAX_LOWER_AS"

# A function of a platform's name and of operands.
Function = Callable[..., Sequence[Array]]


def by_platform(function: Function, *operands: Array, types: Any = None) -> list[Array]:
    """`function(platform, *operands)`, traced at lowering for the platform of the lowering.

    `types` are those of the results; if they are not given, tracing finds them.

    The results for all platforms are equal up to rounding. Use it in functions that have their own
    derivative rule. Where JAX skips that rule, as in a second derivative of a scan, the form of the
    CPU is differentiated, whose operations all have derivatives.
    """
    # A type has the sharding of a result, and the mapped axes along which it varies.
    if types is None:
        types = jax.make_jaxpr(partial(function, "cpu"))(*operands).out_avals
    mesh = jax.sharding.get_abstract_mesh()
    return _by_platform_p.bind(*operands, function=function, types=tuple(types), mesh=mesh)


def lowered_as(platform: str) -> str:
    """The platform whose form is lowered for `platform`; the environment variable overrides it."""
    asked = os.environ.get(VARIABLE) or platform
    if asked not in PLATFORMS:
        raise ValueError(
            f"normjax: the environment variable {VARIABLE} is {asked!r}, expected one of "
            f"{', '.join(PLATFORMS)}. Unset it to lower for the platform at hand."
        )
    return asked


def may_call_kernels(context: Any) -> bool:
    """Whether the lowered program runs unpartitioned on each device, and in this process.

    XLA cannot partition a kernel, and another process may not have it.
    """
    if os.environ.get(VARIABLE) or context.module_context.lowering_parameters.for_export:
        return False
    place = context.module_context.axis_context
    if hasattr(place, "manual_axes"):
        return place.manual_axes == frozenset(place.mesh.axis_names)
    return getattr(place, "num_devices", 1) == 1


def without_kernels(platform: str) -> str:
    """The platform under vmap: kernels have no batched form."""
    return "cpu" if platform == KERNELS else platform


def _run(*operands: Array, **how: Any) -> list[Array]:
    # Compiled, since the platform is known only at lowering.
    with jax.disable_jit(False):
        return jax.jit(partial(_by_platform_p.bind, **how))(*operands)


def tangents_of(function: Function, primals: Any, tangents: Any) -> Sequence[Array]:
    """The tangents of function(*primals), from those tangents that are not symbolically zero."""
    moves = [not isinstance(t, ad.Zero) for t in tangents]

    def of_moving(*moving: Array) -> Sequence[Array]:
        values = iter(moving)
        return function(*(next(values) if m else v for m, v in zip(moves, primals, strict=True)))

    own, d_own = ([v for v, m in zip(vs, moves, strict=True) if m] for vs in (primals, tangents))
    return jax.jvp(of_moving, own, d_own)[1]


def _jvp(primals: Any, tangents: Any, *, function: Function, **how: Any) -> Any:
    out = _by_platform_p.bind(*primals, function=function, **how)
    return out, list(tangents_of(partial(function, "cpu"), primals, tangents))


def _batched(operands: Any, axes: Any, *, function: Function, **_: Any) -> Any:
    def each(platform: str, *operands: Array) -> Sequence[Array]:
        return jax.vmap(partial(function, without_kernels(platform)), axes)(*operands)

    out = by_platform(each, *operands)
    return out, [0] * len(out)


def _lowering(platform: str) -> Callable[..., Any]:
    def lowering(
        context: Any, *operands: Any, function: Function, types: Any, mesh: Any
    ) -> Sequence[Any]:
        name = lowered_as(platform)
        if platform == "cpu" and may_call_kernels(context):
            name = KERNELS

        def chosen(*operands: Array) -> Sequence[Array]:
            with _use_mesh(mesh):
                return function(name, *operands)

        return mlir.lower_fun(chosen, multiple_results=True)(context, *operands)

    return lowering


_by_platform_p = Primitive("by_platform")
_by_platform_p.multiple_results = True
_by_platform_p.def_impl(_run)
_by_platform_p.def_abstract_eval(lambda *_, types, **__: types)
ad.primitive_jvps[_by_platform_p] = _jvp
batching.primitive_batchers[_by_platform_p] = _batched
# An unknown accelerator uses the form of a GPU.
mlir.register_lowering(_by_platform_p, _lowering("gpu"))
for _name, _platform in dict(cpu="cpu", cuda="gpu", rocm="gpu", tpu="tpu").items():
    mlir.register_lowering(_by_platform_p, _lowering(_platform), platform=_name)
