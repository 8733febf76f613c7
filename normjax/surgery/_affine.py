"""Outputs of a layer with a deferred scale and shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from normjax._core.dtypes import accumulation_dtype
from normjax.surgery._constants import Constant, carried, reshape_order, sources
from normjax.surgery._jaxpr import Equation


class Layer(NamedTuple):
    """The start of a chain of scales and shifts.

    Attributes:
        equation: the convolution or product; None if the chain follows no layer.
        x: its input.
        kernel: the known operand, and its position.
        features: for each axis of the output the axis of the kernel that it is, or None.
        where: its path, for reports.
        reason: why the chain cannot be folded into a kernel; None if it can.
    """

    equation: Equation | None
    x: Array
    kernel: tuple[Array, int] | None
    features: tuple[int | None, ...]
    where: str
    reason: str | None


class Piece(NamedTuple):
    """A factor of an axis of a layer's output: a reshape may split the axis."""

    axis: int
    size: Any  # symbolic along a batch


class DeferredAffine(NamedTuple):
    """(layer(x) + offset) * scale + shift, then moved to other axes; nothing is computed yet.

    Attributes:
        layer: what is scaled.
        pieces: the axes of the layer's output, in order, split by reshapes.
        axes: for each axis of the value the pieces that it joins, major first; None if it does not
            consist of pieces.
        shape, dtype: of the value.
        moves: the equations that led to these axes.
        offset: added before the scale if no kernel holds the scale. The mean of x = 1e5 +- 1 must
            be subtracted before anything is rounded.
        scale, shift: like offset, with an axis for each piece, in float32 or wider.
        norms, scales: the paths of the scales, for reports; norms divide by a deviation.
    """

    layer: Layer
    pieces: tuple[Piece, ...]
    axes: tuple[tuple[int, ...] | None, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    moves: tuple[Equation, ...] = ()
    offset: Array | None = None
    scale: Array | None = None
    shift: Array | None = None
    norms: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()

    @classmethod
    def start(cls, layer: Layer, shape: tuple[int, ...], dtype: np.dtype) -> DeferredAffine:
        """The output of a layer, without scale and shift."""
        pieces = tuple(Piece(axis, size) for axis, size in enumerate(shape))
        return cls(layer, pieces, tuple((axis,) for axis in range(len(shape))), shape, dtype)

    @property
    def complete(self) -> bool:
        """Whether another scale would have to multiply the shift, without a kernel to fold into."""
        return self.layer.kernel is None and self.shift is not None

    def admits(self, constant: Constant) -> bool:
        """Whether a known operand varies only along axes that the layer's kernel has."""
        joined = [self.axes[axis] for axis in constant.varying]
        return all(
            pieces is not None
            and all(self.layer.features[self.pieces[piece].axis] is not None for piece in pieces)
            for pieces in joined
        )

    def affine(
        self, equation: Equation, constant: Constant | None, reverse: bool
    ) -> DeferredAffine:
        """After one more addition, subtraction, product, quotient or change of sign."""
        name = equation.name
        if constant is None:
            return self._negated()
        term = self._aligned(constant)
        if name == "sub":
            shifted = self._shifted(-term)
            return shifted._negated() if reverse else shifted
        if name not in ("mul", "div"):
            return self._shifted(term)
        scaled = self._scaled(1 / term if name == "div" else term)
        return scaled._named(equation, constant.deviation) if constant.stored else scaled

    def moved(self, equation: Equation) -> DeferredAffine | None:
        """After a reshape, a transposition or the like; None after any other equation."""
        source = sources(equation, self.shape)
        if source is None:
            return None
        shape = equation.avals[0].shape
        # Without a kernel, stored arrays would depend on the split of a batch axis.
        splits = equation.name == "reshape" and self.layer.kernel is not None
        value = self._reshaped(equation) if splits else None
        if value is None:
            axes = tuple(None if axis is None else self.axes[axis] for axis in source)
            value = self._replace(axes=axes)
        return value._replace(shape=shape, moves=(*self.moves, equation))

    def emit(self, take: Callable[[Array], Array]) -> Array:
        """Computes the value; calls `take` for each array that is known before the call."""
        layer, y = self.layer, self.layer.x
        offset, scale, shift = (
            None if v is None else self._joined(v) for v in (self.offset, self.scale, self.shift)
        )
        width = accumulation_dtype(
            self.dtype, *(v.dtype for v in (offset, scale, shift) if v is not None)
        )
        if layer.kernel is not None and layer.equation is not None:
            kernel, position = layer.kernel
            if scale is not None:
                scaled = kernel.astype(width) * self._for_kernel(scale, kernel.ndim)
                kernel = scaled.astype(kernel.dtype)
            operands = (y, take(kernel)) if position else (take(kernel), y)
            (y,) = layer.equation.bind(*operands)
        else:
            if offset is not None:
                y = y.astype(width) + take(offset)
            if scale is not None:
                y = y.astype(width) * take(scale)
        if shift is not None:
            # After the layer, so that its padding is still zeros.
            y = y.astype(width) + take(shift)
        y = y.astype(self.dtype)
        for move in self.moves:
            (y,) = move.bind(y)
        return y

    def _aligned(self, constant: Constant) -> Array:
        """A known operand with an axis for each piece."""
        array = jnp.asarray(constant.array)
        array = array.astype(accumulation_dtype(array.dtype, self.dtype))
        source: list[int | None] = [None] * len(self.pieces)
        sizes: list[int] = []
        for axis in sorted(constant.varying):
            for piece in self.axes[axis] or ():  # admitted before
                source[piece] = len(sizes)
                sizes.append(self.pieces[piece].size)
        return carried(array.reshape(sizes), source)

    def _joined(self, array: Array) -> Array:
        """An array of pieces in the axes of the layer's output."""
        shape, joined = list(array.shape), []
        for axis in range(len(self.layer.features)):
            places = [i for i, piece in enumerate(self.pieces) if piece.axis == axis]
            if any(shape[i] != 1 for i in places):
                for i in places:
                    shape[i] = self.pieces[i].size
            joined.append(prod(shape[i] for i in places))
        return jnp.broadcast_to(array, shape).reshape(joined)

    def _for_kernel(self, scale: Array, rank: int) -> Array:
        source: list[int | None] = [None] * rank
        for axis, of_kernel in enumerate(self.layer.features):
            if of_kernel is not None:
                source[of_kernel] = axis
        return carried(scale, source)

    def _negated(self) -> DeferredAffine:
        return self._scaled(jnp.full((1,) * len(self.pieces), -1, accumulation_dtype(self.dtype)))

    def _scaled(self, factor: Array) -> DeferredAffine:
        return self._replace(
            scale=factor if self.scale is None else mixed(jnp.multiply, self.scale, factor),
            shift=None if self.shift is None else mixed(jnp.multiply, self.shift, factor),
        )

    def _shifted(self, term: Array) -> DeferredAffine:
        first = self.layer.kernel is None and self.scale is None
        before = self.offset if first else self.shift
        after = term if before is None else mixed(jnp.add, before, term)
        return self._replace(offset=after) if first else self._replace(shift=after)

    def _named(self, equation: Equation, deviation: bool) -> DeferredAffine:
        """With the path of one more scale. The scale of a norm has the path of its root."""
        where = equation.where
        # Outside all modules the only name is that of the operation.
        if where in self.norms or (self.norms and where == equation.name and not deviation):
            return self
        scales = tuple(place for place in self.scales if place != where)
        if deviation:
            return self._replace(norms=(*self.norms, where), scales=scales)
        return self._replace(scales=(*scales, where))

    def _reshaped(self, equation: Equation) -> DeferredAffine | None:
        """With axes split and joined as by a reshape; None where pieces do not fit."""
        axes = [self.axes[axis] for axis in reshape_order(equation, len(self.shape))]
        if any(pieces is None and n != 1 for pieces, n in zip(self.axes, self.shape, strict=True)):
            return None
        order = [piece for pieces in axes for piece in pieces or ()]
        cut = cuts([self.pieces[piece].size for piece in order], equation.avals[0].shape)
        if cut is None:
            return None
        sizes = [[piece.size] for piece in self.pieces]
        for piece, parts in zip(order, cut[0], strict=True):
            sizes[piece] = parts
        starts = [sum(map(len, sizes[:piece])) for piece in range(len(sizes))]
        pieces = tuple(
            Piece(piece.axis, size)
            for piece, parts in zip(self.pieces, sizes, strict=True)
            for size in parts
        )

        def split(array: Array | None) -> Array | None:
            if array is None:
                return None
            parts = zip(array.shape, sizes, strict=True)
            shape = [cut if size != 1 else [1] * len(cut) for size, cut in parts]
            return array.reshape([size for cut in shape for size in cut])

        return self._replace(
            pieces=pieces,
            axes=tuple(tuple(starts[order[i]] + part for i, part in axis) for axis in cut[1]),
            offset=split(self.offset),
            scale=split(self.scale),
            shift=split(self.shift),
        )


def cuts(
    sizes: Sequence[Any], shape: Sequence[Any]
) -> tuple[list[list[Any]], list[list[tuple[int, int]]]] | None:
    """How a reshape splits axes of these sizes and joins the parts, or None where none fits.

    Returns the sizes of the parts of each axis, and for each axis of `shape` the parts that it
    joins, as pairs of axis and number of the part.
    """
    parts: list[list[Any]] = [[] for _ in sizes]
    joined: list[list[tuple[int, int]]] = []
    rest = [(axis, size) for axis, size in enumerate(sizes) if size != 1][::-1]
    if any(size == 0 for size in sizes):
        return None
    for size in shape:
        joined.append([])
        while size != 1:
            if not rest:
                return None
            axis, there = rest.pop()
            if there == size or size % there == 0:
                part = there
            elif there % size == 0:
                part = size
                rest.append((axis, there // size))
            else:
                return None
            size = 1 if part == size else size // part
            joined[-1].append((axis, len(parts[axis])))
            parts[axis].append(part)
    return [part or [1] for part in parts], joined


def mixed(function: Callable, a: Array, b: Array) -> Array:
    """The function of two arrays in their common dtype."""
    width = accumulation_dtype(a.dtype, b.dtype)
    return function(a.astype(width), b.astype(width))


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
