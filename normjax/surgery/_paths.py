"""Paths of batch norms: patterns over them, and the tree of variables that they name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

from flax.core import FrozenDict, freeze

At: TypeAlias = str | Sequence[str] | None
Path: TypeAlias = tuple[str, ...]
# Results have the type of the argument.
Apply = TypeVar("Apply", bound=Callable[..., Any])
Tree = TypeVar("Tree")


def is_nnx(value: Any) -> bool:
    """Whether this is a model of flax.nnx, without importing it."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(value, type) and issubclass(value, nnx.Module):
        raise TypeError(
            f"normjax: got the class {value.__name__}, expected a model, which is an instance of "
            f"it. Pass {value.__name__}(..., rngs=nnx.Rngs(0))."
        )
    return nnx is not None and isinstance(value, nnx.Module)


def expect_no_state(value: Any) -> None:
    """Rejects the state of a model of NNX, which does not say which layers are batch norms."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(value, nnx.State):
        raise TypeError(
            "normjax: got a State of flax.nnx, expected the model itself, which says which layers "
            "are batch norms. Pass the model, or nnx.merge(graphdef, state)."
        )


def params_of(tree: Any) -> Any:
    """The parameters of an NNX model, or of its state, as `nnx.Optimizer` passes them to optax."""
    nnx: Any = sys.modules.get("flax.nnx")
    # Old versions of Flax pass boxed parameters to optax, and lack this function.
    if not hasattr(nnx, "as_pure") or not isinstance(tree, (nnx.Module, nnx.State)):
        return tree
    return nnx.as_pure(nnx.state(tree, nnx.Param) if isinstance(tree, nnx.Module) else tree)


def path_name(path: Iterable[str]) -> str:
    """A path as text; '' is the model itself."""
    return "/".join(path)


def patterns(at: At) -> tuple[str, ...] | None:
    """The patterns of `at` as a tuple; None stands for all layers."""
    if at is None:
        return None
    given = (at,) if isinstance(at, str) else tuple(at) if isinstance(at, Iterable) else ()
    if not given or not all(isinstance(pattern, str) for pattern in given):
        raise TypeError(
            f"normjax: at={at!r}, expected a pattern or several, such as 'block_*/bn', over the "
            "paths of the layers. Leave it out for all layers."
        )
    return given


def chosen(path: str, at: tuple[str, ...] | None) -> bool:
    """Whether a layer is selected. `*` stands for any text, slashes included."""
    return at is None or any(fnmatchcase(path, pattern) for pattern in at)


def expect_matches(at: tuple[str, ...] | None, paths: Collection[str]) -> None:
    """A pattern that matches no layer is an error, since it is most likely misspelled."""
    for pattern in at or ():
        if not any(fnmatchcase(path, pattern) for path in paths):
            there = ", ".join(repr(path) for path in sorted(paths)) or "none"
            raise ValueError(
                f"normjax: at={pattern!r} matches no batch norm. The paths there are: {there}."
            )


def norms(variables: Any, at: At = None) -> dict[Path, dict[str, Any]]:
    """The running statistics of the chosen batch norms by path; at least one."""
    expect_no_state(variables)
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"normjax: variables is {type(variables).__name__}, expected the dictionary that "
            "model.init returns, {'params': ..., 'batch_stats': ...}, or a model of flax.nnx."
        )
    found = nodes(variables.get("batch_stats", {}))
    if not found:
        raise ValueError(
            f"normjax: the variables hold no statistics of a batch norm; their collections are "
            f"{sorted(variables)}. Pass all that model.init returns, 'batch_stats' included."
        )
    given = patterns(at)
    expect_matches(given, [path_name(path) for path in found])
    return {path: node for path, node in found.items() if chosen(path_name(path), given)}


def nodes(tree: Any, path: Path = ()) -> dict[Path, dict[str, Any]]:
    """Every place of a tree of batch statistics that has a mean and a var."""
    if not isinstance(tree, Mapping):
        return {}
    kinds = {name: isinstance(leaf, Mapping) for name, leaf in tree.items()}
    here = kinds.get("mean") is False and kinds.get("var") is False
    found = {path: dict(tree)} if here else {}
    for name, child in tree.items():
        found |= nodes(child, (*path, name))
    return found


def at_path(tree: Any, path: Path) -> Any:
    """The node at a path, {} where there is none."""
    for name in path:
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree


def with_stats(variables: Any, changed: Mapping[Path, Mapping[str, Any]]) -> Any:
    """New variables in which the batch norms at these paths have other statistics."""
    stats: Any = variables["batch_stats"]
    for path, node in changed.items():
        stats = _put(stats, path, node)
    return like(variables, {**variables, "batch_stats": stats})


def like(given: Any, tree: Any) -> Any:
    """A tree in the type of the given dictionary, which may be a FrozenDict of Flax."""
    return freeze(tree) if isinstance(given, FrozenDict) else tree


def _put(tree: Mapping[str, Any], path: Path, node: Mapping[str, Any]) -> dict[str, Any]:
    if not path:
        return {**tree, **node}
    return {**tree, path[0]: _put(tree[path[0]], path[1:], node)}
