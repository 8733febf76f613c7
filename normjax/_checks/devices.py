"""Errors of devices: axes that are not bound, groups that JAX cannot reduce over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.extend.core
from jax import lax


@contextmanager
def collectives(
    called: str,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> Iterator[None]:
    """Words what JAX raises when it cannot reduce over `axis_name`."""
    try:
        yield
    except NameError:
        raise NameError(
            f"{called}: axis_name={axis_name!r} is not bound here; bound are: {_bound_names()}. "
            "Bind it with jax.pmap, jax.shard_map or jax.vmap(..., axis_name=). Under plain jit "
            "over sharded arrays pass axis_name=None: jit reduces over the whole batch by itself."
        ) from None
    except NotImplementedError:
        raise NotImplementedError(
            f"{called}: axis_index_groups={axis_index_groups!r} is not implemented in JAX for the "
            f"way in which axis_name={axis_name!r} is bound. Use jax.pmap, or bind two axes "
            "(groups, members of a group) and pass the members' name as axis_name."
        ) from None


def axis_size(
    called: str,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> int:
    """How many devices share statistics at least; a number, not an operation."""
    with collectives(called, axis_name, axis_index_groups):
        whole = lax.psum(1, axis_name)
    return min(map(len, axis_index_groups)) if axis_index_groups else whole


def groups(called: str, axis_name: object, axis_index_groups: object) -> None:
    """Groups are groups of an axis."""
    if axis_name is None and axis_index_groups is not None:
        raise ValueError(
            f"{called}: axis_index_groups={axis_index_groups!r} without an axis_name, expected "
            "both or neither. Pass the name of the axis whose devices are grouped."
        )


def _bound_names() -> str:
    # JAX has one way of asking, and moved it from jax.core to jax.extend.core.
    for room in (jax.extend.core, jax.core):
        if ask := getattr(room, "unsafe_get_axis_names_DO_NOT_USE", None):
            return ", ".join(map(repr, ask())) or "none"
    return "unknown"
