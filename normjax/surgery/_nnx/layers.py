"""An NNX model as the tools see it: its variables by path, and its batch norms."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from normjax import _errors
from normjax.nnx._batch import _BatchNorm
from normjax.surgery._nnx.adopted import BatchNorm
from normjax.surgery._paths import Path, chosen, expect_matches, written

# The names of the collections of linen, which the tools read.
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def names(path: tuple[Any, ...]) -> Path:
    """A path of attributes and indices, as that of a variable of linen."""
    return tuple(map(str, path))


def variables_of(model: nnx.Module) -> dict[str, Any]:
    """Parameters and statistics as nested dictionaries of arrays, as linen has them."""
    return {
        name: unflatten_dict(
            {
                names(path): variable.get_value()
                for path, variable in nnx.to_flat_state(nnx.state(model, kind))
            }
        )
        for name, kind in COLLECTIONS.items()
    }


def with_variables(model: Any, variables: Mapping[str, Any]) -> Any:
    """A copy of the model that holds these variables."""
    copy = nnx.clone(model)
    for name, kind in COLLECTIONS.items():
        values = flatten_dict(variables[name])
        for path, variable in nnx.to_flat_state(nnx.state(copy, kind)):
            variable.set_value(jnp.asarray(values[names(path)]))
    return copy


def on_variables(
    model: Any, tool: Callable[[dict[str, Any]], Mapping[str, Any]], at: tuple[str, ...] | None
) -> Any:
    """A copy of the model whose variables went through a tool for those of linen."""
    batch_norms(model, at)
    return with_variables(model, tool(variables_of(model)))


def batch_norms(model: nnx.Module, at: tuple[str, ...] | None = None) -> dict[Path, Any]:
    """The chosen batch norms of a model by path; at least one."""
    modules = {names(path): module for path, module in nnx.iter_modules(model)}
    known = {path: module for path, module in modules.items() if is_batch_norm(module)}
    others = {
        path: module
        for path, module in modules.items()
        if path not in known and _keeps_statistics(module)
    }
    if not known and not others:
        raise ValueError(
            "normjax: the model has no batch norm, expected at least one. Recognized are "
            "flax.nnx.BatchNorm and the batch norms of normjax.nnx. Pass the whole model."
        )
    expect_matches(at, [written(path) for path in (*known, *others)])
    for path, module in others.items():
        if chosen(written(path), at):
            raise ValueError(
                f"normjax: the {type(module).__name__} at '{written(path)}' holds a mean and a var "
                "in nnx.BatchStat, as a batch norm does, and was not recognized as one. Recognized "
                "are flax.nnx.BatchNorm, unless a subclass has a __call__ of its own, and the "
                "batch norms of normjax.nnx with what extends them. If it is no batch norm, name "
                "those that are: at=."
            )
    return {path: module for path, module in known.items() if chosen(written(path), at)}


def is_batch_norm(module: Any) -> bool:
    """Whether the code of a module is known: Flax's, or one that calls ours."""
    of_flax = isinstance(module, nnx.BatchNorm)
    return isinstance(module, _BatchNorm) or (
        of_flax and type(module).__call__ is nnx.BatchNorm.__call__
    )


def _keeps_statistics(module: Any) -> bool:
    return all(isinstance(getattr(module, n, None), nnx.BatchStat) for n in ("mean", "var"))


def serving(call: Callable, model: nnx.Module) -> tuple[Callable, nnx.State]:
    """`call(model, *inputs)` as a function of the state of the model in evaluation mode."""
    copy = nnx.clone(model)
    copy.eval()
    graphdef, state = nnx.split(copy)

    def serve(state: nnx.State, *inputs: Any) -> Any:
        model = nnx.merge(graphdef, state)
        called: dict[Path, Any] = {
            names(p): module for p, module in nnx.iter_modules(model) if callable(module)
        }
        for path, module in called.items():
            outer = max((n for n in range(len(path)) if path[:n] in called), default=0)
            module.normjax_scope = written(path[outer:])
            pass_through(module, _Scoped)
        return call(model, *inputs)

    return serve, state


def copied(model: Any, at: tuple[str, ...] | None) -> tuple[Any, dict[Path, Any]]:
    """A copy of the model, and its chosen batch norms, all of which run by the code of normjax."""
    copy = nnx.clone(model)
    layers = batch_norms(copy, at)
    for layer in layers.values():
        if not isinstance(layer, _BatchNorm):
            for field in dataclasses.fields(BatchNorm):
                if not hasattr(layer, field.name):
                    setattr(layer, field.name, field.default)
            layer.__class__ = BatchNorm
    return copy, layers


def become(layer: nnx.Module, other: nnx.Module) -> None:
    """Another module at all places of a layer, wherever a model holds it."""
    layer.__class__ = type(other)
    vars(layer).clear()
    vars(layer).update(vars(other))


def pass_through(layer: Any, mixin: Any) -> None:
    """Sends the calls of a layer through the method of a mixin, an nnx.Module, first."""
    kind: Any = type(layer)
    layer.__class__ = _derived(mixin, kind)


@functools.cache
def _derived(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


class _Scoped(nnx.Module):
    """Names what a module computes by its attribute, as linen does, for reports."""

    normjax_scope: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(self.normjax_scope) if self.normjax_scope else nullcontext():
            return super().__call__(*args, **kwargs)


class Given(NamedTuple):
    """What a batch norm is called with."""

    x: Any
    train: bool
    mask: Any


def read(layer: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Given:
    """The arguments of `call`, the method of a batch norm, and the mode that it will run in."""
    given = inspect.signature(call).bind(*args, **kwargs).arguments
    asked = {name: given.get(name) for name in ("train", "use_running_average")}
    mode = _errors.mode_of(layer.use_running_average, getattr(layer, "frozen", False), asked)
    return Given(given["x"], mode.train, given.get("mask"))
