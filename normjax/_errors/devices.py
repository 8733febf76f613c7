"""Errors of devices: unbound axes, and groups that JAX does not support."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Number
from operator import index
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax import lax


def axis_size(
    axis_name: str | Sequence[str], axis_index_groups: Sequence[Sequence[int]] | None
) -> int:
    """The least number of devices that share statistics, as a Python number."""
    _names(axis_name)
    try:
        whole = lax.psum(1, axis_name)
    except NameError:
        raise NameError(f"normjax: {_unbound(axis_name)}") from None
    if axis_index_groups is None:
        return whole
    _partition(axis_name, axis_index_groups, whole)
    return min(map(len, axis_index_groups))


@contextmanager
def grouped(
    axis_name: str | Sequence[str] | None, axis_index_groups: Sequence[Sequence[int]] | None
) -> Iterator[None]:
    """Rewords the error that JAX raises if it does not support groups of `axis_name`."""
    try:
        yield
    except NotImplementedError:
        raise NotImplementedError(
            f"normjax: axis_index_groups={axis_index_groups!r} is not implemented in JAX for the "
            f"way in which axis_name={axis_name!r} is bound: jax.vmap has no groups, and "
            "jax.shard_map with check_vma=True none of unequal size. Use jax.pmap or "
            "jax.shard_map(..., check_vma=False), or bind two axes (groups, members of a group) "
            "and pass the members' name as axis_name."
        ) from None


def groups(axis_name: object, axis_index_groups: object) -> None:
    """Groups need the name of an axis."""
    if axis_name is not None:
        _names(axis_name)
    elif axis_index_groups is not None:
        raise ValueError(
            f"normjax: axis_index_groups={axis_index_groups!r} without an axis_name, expected "
            "both or neither. Pass the name of the axis whose devices are grouped."
        )


def _names(axis_name: Any) -> None:
    """Names are hashable; JAX would read a number as an axis of the array, by its position."""
    names = _listed(axis_name)
    try:
        hash(tuple(names))
        numbers = any(isinstance(name, (Number, np.bool_)) for name in names)
    except TypeError:
        numbers = True
    if numbers:
        raise TypeError(
            f"normjax: axis_name={axis_name!r}, expected the name or a list of names of mapped "
            'axes, for example axis_name="batch" of jax.vmap(..., axis_name="batch"). To choose '
            "axes of x by their position pass axis= or feature_axis=."
        )


def _listed(axis_name: Any) -> list[Any]:
    return list(axis_name) if isinstance(axis_name, (list, tuple)) else [axis_name]


def _partition(axis_name: object, axis_index_groups: object, size: int) -> None:
    """Each device is in one group; XLA accepts some other lists and returns arbitrary values."""
    got = f"normjax: axis_index_groups={axis_index_groups!r}"
    try:
        found = Counter(index(i) for group in axis_index_groups for i in group)  # type: ignore
        empty = not all(map(len, axis_index_groups))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise TypeError(
            f"{got} is not a list of lists of indices, expected for example "
            f"{[list(range(size // 2)), list(range(size // 2, size))]}."
        ) from None
    whole = range(size)
    faults = {
        "in no group": [i for i in whole if i not in found],
        "in several": [i for i in whole if found[i] > 1],
        "beyond the axis": sorted(set(found) - set(whole)),
    }
    wrong = [f"{fault}: {some}" for fault, some in faults.items() if some]
    if wrong or empty:
        raise ValueError(
            f"{got} does not divide the {size} devices of axis_name={axis_name!r} into groups "
            f"({', '.join(wrong) or 'one is empty'}). Name each index from 0 to {size - 1} in one "
            "group."
        )


def _unbound(axis_name: str | Sequence[str]) -> str:
    """The requested axis, the bound axes, and the likely fix."""
    bound = bound_names()
    missing = [name for name in _listed(axis_name) if name not in bound]
    known = ", ".join(map(repr, bound)) or "none"
    got = f"axis_name={axis_name!r} is not bound here; bound are: {known}. "
    for name in missing:
        if near := get_close_matches(str(name), [b for b in bound if isinstance(b, str)], 1):
            return got + f"Did you mean {near[0]!r}?"
    if in_mesh := [name for name in missing if name in jax.sharding.get_abstract_mesh().axis_names]:
        return got + (
            f"{in_mesh[0]!r} is an axis of the mesh, which jit does not bind: it reduces over the "
            "whole batch by itself. Pass axis_name=None, or map the step with jax.shard_map."
        )
    return got + (
        "Bind it with jax.pmap, jax.shard_map or jax.vmap(..., axis_name=). Under plain jit over "
        "sharded arrays pass axis_name=None: jit reduces over the whole batch by itself."
    )


def bound_names() -> list[object]:
    """The device axes that are bound here."""
    # JAX moved this function from jax.core to jax.extend.core.
    for module in (jax.extend.core, jax.core):
        if get := getattr(module, "unsafe_get_axis_names_DO_NOT_USE", None):
            return list(get())
    return []
