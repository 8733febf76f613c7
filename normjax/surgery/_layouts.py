"""Layouts and names of the arrays of layers in other libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
    """The axes of an array in Flax and in the other library, and both conversions.

    Attributes:
        here: the axes in Flax, as "*window in out": a name for each axis, "*" before one that
            stands for one or more, "1" for an axis of size 1, and "..." for any axes or none.
        there: the axes in the other library, in words.
        inward: converts the other library's array to that of Flax, given the leaf to fill.
        outward: converts Flax's array to that of the other library.
        part: which third of the other library's array it is; None for all of it.
    """

    here: str
    there: str
    inward: Callable[[np.ndarray, Any], np.ndarray] = lambda array, _: array
    outward: Callable[[np.ndarray], np.ndarray] = lambda array: array
    part: int | None = None

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a leaf of this shape has the axes of `here`."""
        axes = self.here.split()
        if axes == ["..."]:
            return True
        several = any(axis.startswith("*") for axis in axes)
        if len(shape) < len(axes) or (len(shape) > len(axes) and not several):
            return False
        # "*" is the first axis if there is one, so names are counted from the last.
        pairs = zip(reversed(axes), reversed(shape), strict=False)
        return all(size == 1 for axis, size in pairs if axis == "1")

    def shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the other library's array for a leaf of this shape."""
        there = self.outward(np.broadcast_to(np.int8(0), shape)).shape
        return there if self.part is None else (PARTS * there[0], *there[1:])


# Query, key and value, where they are one array.
PARTS = 3

VECTOR = Layout("features", "features")
# Of any rank, with one order of axes in both.
FEATURES = Layout("*features", "*features")
EMBEDDING = Layout("entries features", "entries features")
ANY = Layout("...", "the same axes")

# For each (collection, name) of a Flax layer the other library's name and layout.
Kind = Mapping[tuple[str, str], tuple[str, Layout]]


class NameMapping(NamedTuple):
    """The names of another library for the arrays of its layers.

    Attributes:
        kinds: its layers.
        separator: between the module and the name of an array.
        optional: names that need no counterpart in Flax.
    """

    kinds: Mapping[str, Kind]
    separator: str
    optional: tuple[str, ...] = ()

    def join(self, module: str, name: str) -> str:
        return self.separator.join(filter(None, (module, name)))

    def owns(self, name: str) -> bool:
        """Whether a layer of some kind holds an array of this name in Flax."""
        return any(
            name == held.rpartition("/")[2] for kind in self.kinds.values() for _, held in kind
        )
