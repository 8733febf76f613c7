"""Values of a program under folding: known ones, and outputs of a layer still to be scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from normjax._moments import wide
from normjax.surgery._program import Equation

ELEMENTWISE = {
    "abs", "add", "and", "cbrt", "ceil", "convert_element_type", "copy", "cos", "div", "eq", "erf",
    "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "round",
    "reduce_precision", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient",
    "sub", "tanh",
}  # fmt: skip
ROOTS = {"rsqrt", "sqrt", "pow", "integer_pow"}


class Known(NamedTuple):
    """A value that depends on no input of the call.

    Attributes:
        array: its entries, with size 1 along each axis over which it only repeats itself, so that
            what is stored for serving has no trace of the batch size.
        shape: its shape in the program.
        stored: whether it comes from the variables, and is not a constant of the program.
        deviation: whether a root was taken on the way from the variables, as in a norm.
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


class Layer(NamedTuple):
    """Where a chain of scales and shifts starts.

    Attributes:
        equation: the convolution or product; None where the chain follows no layer.
        x: what goes in.
        kernel: the operand that is known, and its position.
        features: for each axis of the output the axis of the kernel that it is, or None.
        where: for people.
        reason: why no kernel takes in what follows; None where there is one.
    """

    equation: Equation | None
    x: Array
    kernel: tuple[Array, int] | None
    features: tuple[int | None, ...]
    where: str
    reason: str | None


class Pending(NamedTuple):
    """layer(x) * scale + shift, then moved to other axes; nothing of it is computed yet.

    Attributes:
        layer: what is scaled.
        axes: for each axis of the value the axis of the layer's output that it is, or None.
        shape, dtype: of the value.
        moves: the equations that led to these axes.
        scale, shift: in the axes of the layer's output, in float32 or wider.
        norms: where the scales came from, for people.
        deviation: whether one of them is a deviation.
    """

    layer: Layer
    axes: tuple[int | None, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    moves: tuple[Equation, ...] = ()
    scale: Array | None = None
    shift: Array | None = None
    norms: tuple[str, ...] = ()
    deviation: bool = False

    def admits(self, known: Known) -> bool:
        """Whether a known operand says nothing that the layer's kernel could not say."""
        at = [self.axes[axis] for axis in known.varying]
        return all(axis is not None and self.layer.features[axis] is not None for axis in at)

    def affine(self, equation: Equation, known: Known | None, reverse: bool) -> Pending:
        """After one more addition, subtraction, product, quotient or change of sign."""
        name = equation.name
        if known is None:
            return self._scaled(-self._one())
        term = self._aligned(known)
        if name == "add":
            return self._shifted(term)
        if name == "sub" and reverse:
            return self._scaled(-self._one())._shifted(term)  # known - value
        if name == "sub":
            return self._shifted(-term)
        factor = 1 / term if name == "div" else term
        norms = self.norms
        if known.stored and equation.where not in norms:
            norms = (*norms, equation.where)
        scaled = self._scaled(factor)
        return scaled._replace(norms=norms, deviation=self.deviation or known.deviation)

    def moved(self, equation: Equation) -> Pending | None:
        """After a reshape, a transposition or the like; None after anything else."""
        source = sources(equation, self.shape)
        if source is None:
            return None
        axes = tuple(None if axis is None else self.axes[axis] for axis in source)
        shape = equation.avals[0].shape
        return self._replace(axes=axes, shape=shape, moves=(*self.moves, equation))

    def emit(self, take: Callable[[Array], Array]) -> Array:
        """Computes it, with `take` for whatever is known before the call."""
        layer, y = self.layer, self.layer.x
        width = wide(self.dtype, *(v.dtype for v in (self.scale, self.shift) if v is not None))
        if layer.kernel is not None and layer.equation is not None:
            kernel, position = layer.kernel
            if self.scale is not None:
                scaled = kernel.astype(width) * self._for_kernel(kernel.ndim)
                kernel = scaled.astype(kernel.dtype)
            operands = (y, take(kernel)) if position else (take(kernel), y)
            (y,) = layer.equation.bind(*operands)
        elif self.scale is not None:
            y = y.astype(width) * take(self.scale)
        if self.shift is not None:
            # Behind the layer, so that padding is padded with zeros as before.
            y = y.astype(width) + take(self.shift)
        y = y.astype(self.dtype)
        for move in self.moves:
            (y,) = move.bind(y)
        return y

    def _one(self) -> Array:
        return jnp.ones((1,) * len(self.layer.features), wide(self.dtype))

    def _aligned(self, known: Known) -> Array:
        """A known operand in the axes of the layer's output."""
        array = jnp.asarray(known.array)
        array = array.astype(wide(array.dtype, self.dtype))
        if not array.ndim:
            return array.reshape((1,) * len(self.layer.features))
        source: list[int | None] = [None] * len(self.layer.features)
        for axis in known.varying:
            source[self.axes[axis]] = axis  # type: ignore[index]  # admitted before
        return carried(array, source)

    def _for_kernel(self, rank: int) -> Array:
        source: list[int | None] = [None] * rank
        for axis, of_kernel in enumerate(self.layer.features):
            if of_kernel is not None:
                source[of_kernel] = axis
        return carried(self.scale, source)

    def _scaled(self, factor: Array) -> Pending:
        return self._replace(
            scale=factor if self.scale is None else mixed(jnp.multiply, self.scale, factor),
            shift=None if self.shift is None else mixed(jnp.multiply, self.shift, factor),
        )

    def _shifted(self, term: Array) -> Pending:
        return self._replace(shift=term if self.shift is None else mixed(jnp.add, self.shift, term))


def mixed(function: Callable, a: Array, b: Array) -> Array:
    """Of two arrays in the wider of their dtypes."""
    width = wide(a.dtype, b.dtype)
    return function(a.astype(width), b.astype(width))


def carried(array: Any, source: Sequence[int | None]) -> Array:
    """An array laid out anew: each axis is one of its own or, for None, of size 1."""
    kept = [axis for axis in source if axis is not None]
    dropped = [axis for axis in range(array.ndim) if axis not in kept]
    moved = jnp.transpose(jnp.squeeze(array, dropped), [sorted(kept).index(a) for a in kept])
    return jnp.expand_dims(moved, [i for i, axis in enumerate(source) if axis is None])


def sources(equation: Equation, shape: tuple[int, ...]) -> tuple[int | None, ...] | None:
    """For each axis of the result the axis of the operand that it is; None if it is no move."""
    params, new = equation.params, equation.avals[0].shape
    if equation.name == "transpose":
        return tuple(params["permutation"])
    if equation.name == "squeeze":
        return tuple(a for a in range(len(shape)) if a not in params["dimensions"])
    if equation.name == "broadcast_in_dim":
        places = {to: a for a, to in enumerate(params["broadcast_dimensions"])}
        return tuple(places.get(axis) for axis in range(len(new)))
    if equation.name == "reshape" and params["dimensions"] is None:
        starts = {(prod(shape[:a]), n): a for a, n in enumerate(shape) if n != 1}
        return tuple(starts.get((prod(new[:axis]), n)) for axis, n in enumerate(new))
    return None


def manner(equation: Equation, given: Sequence[Known]) -> str:
    """How an equation of known operands is evaluated: "compact", "whole", or when "serving".

    What only repeats itself is never written out beforehand, since it may do so for each example.
    What prints does so at each call.
    """
    if equation.lasting:
        return "serving"
    if equation.name in ELEMENTWISE or (len(given) == 1 and _source(equation, given[0])):
        return "compact"
    return "whole" if all(known.whole for known in given) else "serving"


def evaluate(equation: Equation, given: Sequence[Known]) -> list[Known]:
    """An equation of known operands, beforehand."""
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
    return [Known(array, aval.shape, stored, deviation) for array, aval in results]


def _source(equation: Equation, known: Known) -> tuple[int | None, ...] | None:
    source = sources(equation, known.shape)
    return source if source is not None and known.varying <= set(source) else None


def _move(equation: Equation, known: Known) -> Known:
    source = _source(equation, known) or ()
    kept = [axis if axis in known.varying else None for axis in source]
    array = carried(jnp.asarray(known.array), kept)
    return known._replace(array=array, shape=equation.avals[0].shape)


def whole(known: Known, take: Callable[[Array], Array]) -> Array:
    """The array as the program has it."""
    array = take(known.array) if known.stored else known.array
    return array if known.whole else jnp.broadcast_to(array, known.shape)


def features_of(equation: Equation, position: int, rank: int) -> tuple[int | None, ...]:
    """For each axis of a layer's output the axis of its operand at `position`, or None."""
    out = len(equation.avals[0].shape)
    if equation.name == "conv_general_dilated":
        spec = equation.params["dimension_numbers"]
        return tuple(spec.rhs_spec[0] if axis == spec.out_spec[1] else None for axis in range(out))
    contract, batch = (sides[position] for sides in equation.params["dimension_numbers"])
    free = [axis for axis in range(rank) if axis not in (*contract, *batch)]
    # The result of a product has the shared axes first, then those of its left operand.
    others = [None] * (out - len(batch) - len(free))
    return (*batch, *others, *free) if position else (*batch, *free, *others)
