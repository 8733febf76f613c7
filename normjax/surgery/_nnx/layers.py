"""The variables of an NNX model by path, and its batch norms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from normjax import Moments, _errors
from normjax.nnx._batch import _BatchNorm
from normjax.surgery._nnx.adopted import Derived, adopt
from normjax.surgery._paths import Path, at_path, chosen, expect_matches, nodes, path_name

# The names of the collections of linen, which the tools read.
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def names(path: tuple[Any, ...]) -> Path:
    """A path of attributes and indices, in the form of a path of linen."""
    return tuple(map(str, path))


def _arrays(model: nnx.Module, kind: Any) -> dict[Path, Any]:
    """The variables of a kind by path; those that hold a tree of arrays are left out."""
    found = {names(p): v for p, v in nnx.to_flat_state(nnx.state(model, kind))}
    return {path: v for path, v in found.items() if hasattr(v.get_value(), "shape")}


def variables_of(model: nnx.Module) -> dict[str, Any]:
    """Parameters and statistics as nested dictionaries of arrays, as in linen."""
    return {
        name: unflatten_dict({p: v.get_value() for p, v in _arrays(model, kind).items()})
        for name, kind in COLLECTIONS.items()
    }


def with_variables(model: Any, variables: Mapping[str, Any]) -> Any:
    """A copy of the model with these variables, each with the sharding of the old one."""
    copy = nnx.clone(model)
    for name, kind in COLLECTIONS.items():
        for path, variable in _arrays(copy, kind).items():
            old, new = variable.get_value(), at_path(variables[name], path)
            if new is not old:
                variable.set_value(_placed(new, old))
    return copy


def filled(model: Any, variables: Mapping[str, Any]) -> Any:
    """`with_variables` for a model that `nnx.eval_shape` made; nothing of it may stay abstract."""
    copy = with_variables(model, variables)
    abstract = [
        path_name(names(path))
        for path, variable in nnx.to_flat_state(nnx.state(copy))
        if any(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(variable.get_value()))
    ]
    if abstract:
        raise ValueError(
            f"normjax: {abstract} would stay abstract, as nnx.eval_shape made them, expected "
            "arrays: they are neither parameters nor statistics. Pass the model itself, made "
            "without nnx.eval_shape."
        )
    return copy


def _placed(new: Any, old: Any) -> Any:
    known = isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer)
    several = known and len(old.devices()) > 1
    return jax.device_put(new, old.sharding) if several else jnp.asarray(new)


def with_statistics(
    model: Any, tool: Callable[[dict[str, Any]], Mapping[str, Any]], at: tuple[str, ...] | None
) -> Any:
    """A copy of the model with the new statistics that a tool returns for its variables."""
    for layer in batch_norms(model, at).values():
        expect_arrays(layer)
    copy = with_variables(model, tool(variables_of(model)))
    for layer in batch_norms(copy, at).values():
        if getattr(layer, "moments", None) is not None:
            # Kept moments of micro-batches belong to the old statistics.
            kept = layer.moments.get_value()
            layer.moments.set_value(Moments.make(kept.mean.shape, kept.mean.dtype))
    return copy


def expect_arrays(layer: Any) -> None:
    """Rejects abstract statistics, such as those of `nnx.eval_shape`."""
    for name in ("mean", "var"):
        _errors.restored(name, getattr(layer, name).get_value())


def pure(state: nnx.State) -> Any:
    """The state without its variables, which are the model's own if they are hijax variables."""
    return nnx.as_pure(state) if hasattr(nnx, "as_pure") else nnx.pure(state)


def batch_norms(model: nnx.Module, at: tuple[str, ...] | None = None) -> dict[Path, Any]:
    """The chosen batch norms of a model by path; at least one, and none that is not recognized."""
    known = known_batch_norms(model)
    kinds = {names(path): type(module).__name__ for path, module in nnx.iter_modules(model)}
    # Statistics in a dictionary, or of a linen module inside, belong to no NNX module.
    statistics = nodes(variables_of(model)["batch_stats"])
    others = {path: kinds.get(path, "dictionary") for path in statistics if path not in known}
    if not known and not others:
        raise ValueError(
            "normjax: the model has no batch norm, expected at least one. Recognized are "
            "flax.nnx.BatchNorm and the batch norms of normjax.nnx. Pass the whole model."
        )
    expect_matches(at, [path_name(path) for path in (*known, *others)])
    for path, kind in others.items():
        if chosen(path_name(path), at):
            raise ValueError(
                f"normjax: the {kind} at '{path_name(path)}' holds a mean and a var in "
                "nnx.BatchStat, as a batch norm does, and was not recognized as one. Recognized "
                "are flax.nnx.BatchNorm, unless a subclass has a __call__ of its own, and the "
                "batch norms of normjax.nnx with what extends them; not those of linen. If it is "
                "no batch norm, name those that are: at=."
            )
    return {path: module for path, module in known.items() if chosen(path_name(path), at)}


def known_batch_norms(model: nnx.Module) -> dict[Path, Any]:
    """The recognized batch norms of a model by path."""
    modules = {names(path): module for path, module in nnx.iter_modules(model)}
    return {path: module for path, module in modules.items() if is_batch_norm(module)}


def is_batch_norm(module: Any) -> bool:
    """Whether a module runs the batch norm code of Flax or of normjax."""
    of_flax = isinstance(module, nnx.BatchNorm)
    return isinstance(module, _BatchNorm) or (
        of_flax and type(module).__call__ is nnx.BatchNorm.__call__
    )


def serving(call: Callable, model: nnx.Module) -> tuple[Callable, Any]:
    """`call(model, *inputs)` as a function of the state of the model in evaluation mode."""
    copy = nnx.clone(model)
    copy.eval()
    graphdef, state = nnx.split(copy)

    def serve(state: Any, *inputs: Any) -> Any:
        model = nnx.merge(graphdef, state)
        # Only layers: operations in a user's own module have no name.
        scoped: dict[Path, Any] = {names(p): m for p, m in nnx.iter_modules(model) if _is_layer(m)}
        for path, module in scoped.items():
            outer = max((n for n in range(len(path)) if path[:n] in scoped), default=0)
            module.normjax_scope = path_name(path[outer:])
            pass_through(module, _Scoped)
        return call(model, *inputs)

    return serve, pure(state)


def _is_layer(module: Any) -> bool:
    return callable(module) and type(module).__module__.startswith(("flax.nnx.nn.", "normjax."))


def copied(model: Any, at: tuple[str, ...] | None) -> tuple[Any, dict[Path, Any]]:
    """A copy of the model, and its chosen batch norms, all of which run the code of normjax."""
    copy = nnx.clone(model)
    layers = batch_norms(copy, at)
    for layer in layers.values():
        adopt(layer)
    return copy, layers


def become(layer: nnx.Module, other: nnx.Module) -> None:
    """Turns a layer into another module, wherever the model holds it."""
    layer.__class__ = type(other)
    vars(layer).clear()
    vars(layer).update(vars(other))


def pass_through(layer: Any, mixin: Any) -> None:
    """Makes the calls of a layer run the method of a mixin, a `Derived`, first."""
    kind: Any = type(layer)
    if not issubclass(kind, mixin):
        layer.__class__ = _derived(mixin, kind)


@functools.cache
def _derived(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


class _Scoped(Derived):
    """Names what a module computes by its attribute, as linen does, for reports."""

    normjax_scope: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(self.normjax_scope) if self.normjax_scope else nullcontext():
            return super().__call__(*args, **kwargs)
