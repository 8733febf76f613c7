"""Values of a program that are known before the call, in compact form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from normjax.surgery._jaxpr import Equation

ELEMENTWISE = {
    "abs", "add", "and", "cbrt", "ceil", "convert_element_type", "copy", "cos", "div", "eq", "erf",
    "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "round",
    "reduce_precision", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient",
    "sub", "tanh",
}  # fmt: skip
ROOTS = {"rsqrt", "sqrt", "pow"}


class Constant(NamedTuple):
    """A value that depends on no input of the call.

    Attributes:
        array: its entries, with size 1 along each axis of repeated entries, so that the arrays
            stored for serving do not depend on the batch size.
        shape: its shape in the program.
        stored: whether it comes from the variables, and is not a constant of the program.
        deviation: whether it was computed from the variables with a root, as in a norm.
    """

    array: Any
    shape: tuple[int, ...]
    stored: bool = False
    deviation: bool = False

    @property
    def whole(self) -> bool:
        return jnp.shape(self.array) == self.shape

    @property
    def varying(self) -> set[int]:
        """The axes along which its entries may differ."""
        return {axis for axis, size in enumerate(jnp.shape(self.array)) if size != 1}


def evaluation(equation: Equation, given: Sequence[Constant]) -> str:
    """How an equation of known operands is evaluated: "compact", "whole", or when "serving".

    Repeated entries are never expanded beforehand, since they may be repeated for each example.
    Equations that print run at each call.
    """
    if equation.lasting:
        return "serving"
    if equation.name in ELEMENTWISE or (len(given) == 1 and _source(equation, given[0])):
        return "compact"
    return "whole" if all(known.whole for known in given) else "serving"


def evaluate(equation: Equation, given: Sequence[Constant]) -> list[Constant]:
    """Evaluates an equation of known operands before the call."""
    if equation.name not in ELEMENTWISE and len(given) == 1 and _source(equation, given[0]):
        return [_move(equation, given[0])]
    arrays = [known.array for known in given]
    if equation.name in ELEMENTWISE:
        common = jnp.broadcast_shapes(*map(jnp.shape, arrays))
        arrays = [a if not jnp.ndim(a) else jnp.broadcast_to(a, common) for a in arrays]
    stored = any(known.stored for known in given)
    deviation = any(known.deviation for known in given)
    deviation |= stored and equation.name in ROOTS
    results = zip(equation.bind(*arrays), equation.avals, strict=True)
    return [Constant(array, aval.shape, stored, deviation) for array, aval in results]


def _source(equation: Equation, constant: Constant) -> tuple[int | None, ...] | None:
    source = sources(equation, constant.shape)
    return source if source is not None and constant.varying <= set(source) else None


def _move(equation: Equation, constant: Constant) -> Constant:
    source = _source(equation, constant) or ()
    kept = [axis if axis in constant.varying else None for axis in source]
    array = carried(jnp.asarray(constant.array), kept)
    return constant._replace(array=array, shape=equation.avals[0].shape)


def whole(constant: Constant, take: Callable[[Array], Array]) -> Array:
    """The array as the program has it."""
    array = take(constant.array) if constant.stored else constant.array
    return array if constant.whole else jnp.broadcast_to(array, constant.shape)


def carried(array: Any, source: Sequence[int | None]) -> Array:
    """An array with new axes: each is one of its own axes or, for None, of size 1."""
    kept = [axis for axis in source if axis is not None]
    dropped = [axis for axis in range(array.ndim) if axis not in kept]
    moved = jnp.transpose(jnp.squeeze(array, dropped), [sorted(kept).index(a) for a in kept])
    return jnp.expand_dims(moved, [i for i, axis in enumerate(source) if axis is None])


def sources(equation: Equation, shape: tuple[int, ...]) -> tuple[int | None, ...] | None:
    """For each axis of the result its axis in the operand; None if entries are not just moved."""
    params, new = equation.params, equation.avals[0].shape
    if equation.name == "transpose":
        return tuple(params["permutation"])
    if equation.name == "squeeze":
        return tuple(a for a in range(len(shape)) if a not in params["dimensions"])
    if equation.name == "broadcast_in_dim":
        # A repeated axis is a new axis.
        kept = enumerate(params["broadcast_dimensions"])
        places = {to: a for a, to in kept if shape[a] == new[to]}
        return tuple(places.get(axis) for axis in range(len(new)))
    if equation.name == "reshape":
        order = reshape_order(equation, len(shape))
        sizes = [shape[axis] for axis in order]
        starts = {(prod(sizes[:i]), n): order[i] for i, n in enumerate(sizes) if n != 1}
        return tuple(starts.get((prod(new[:axis]), n)) for axis, n in enumerate(new))
    return None


def reshape_order(equation: Equation, rank: int) -> tuple[int, ...]:
    """The order in which a reshape reads the axes of its operand."""
    return tuple(equation.params["dimensions"] or range(rank))
