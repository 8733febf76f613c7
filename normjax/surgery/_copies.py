"""Copies of Flax's batch norm: other classes with the same variables and the same mode argument.

Many code bases have a copy of Flax's batch norm that does not extend it. A copy is recognized by
its variables and arguments, and runs its own code: only its mode, its device axis and the gradients
of its parameters can be changed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax import lax

from normjax.surgery._paths import nodes

# The names of the mode argument, and whether True is training.
SWITCHES = {"use_running_average": False, "train": True, "training": True, "is_training": True}


class Copy(NamedTuple):
    """One call of a copy: its arguments, and the mode that it is called in."""

    bound: inspect.BoundArguments
    switch: str
    train: bool

    @property
    def x(self) -> Any:
        """The first argument after the module."""
        return list(self.bound.arguments.values())[1]


def statistics_of(module: Any) -> str | None:
    """The collection in which a module itself keeps a mean and a var; None if it keeps none."""
    # The linen wrapper of a module of NNX keeps the statistics of all its layers.
    whole = type(module).__module__.startswith("flax.nnx")
    for collection, tree in module.variables.items():
        own = {name: leaf for name, leaf in tree.items() if whole or not isinstance(leaf, Mapping)}
        if collection != "params" and nodes(own):
            return collection
    return None


def copy_of(module: Any, body: Callable, args: tuple, kwargs: dict[str, Any]) -> Copy | None:
    """The call as that of a batch norm, if the module behaves like one."""
    if statistics_of(module) != "batch_stats":
        return None
    code = getattr(inspect.unwrap(body), "__code__", None)
    # A class that calls its parent's code is recognized in that call.
    delegates = code is None or "__call__" in code.co_names
    has_children = any(
        isinstance(leaf, Mapping) for tree in module.variables.values() for leaf in tree.values()
    )
    if delegates or has_children:
        return None
    try:
        bound = inspect.signature(body).bind(module, *args, **kwargs)
    except TypeError:
        return None  # The module itself raises for its arguments.
    bound.apply_defaults()
    fields = _fields_of(module)
    for switch, means_training in SWITCHES.items():
        if switch not in bound.signature.parameters and switch not in fields:
            continue
        given = bound.arguments.get(switch)
        mode = fields.get(switch) if given is None else given
        if mode is None or isinstance(mode, jax.core.Tracer):
            return None
        return Copy(bound, switch, bool(mode) == means_training)
    return None


def run_copy(
    copy: Copy, next_fun: Callable, module: Any, train: bool, frozen: bool, devices: dict[str, Any]
) -> Any:
    """Runs the code of a copy in another mode, over other devices, or without gradients."""
    switch, mode = copy.switch, train == SWITCHES[copy.switch]
    fields = _fields_of(module)
    changed = {name: value for name, value in devices.items() if name in fields}
    if switch in copy.bound.signature.parameters:
        copy.bound.arguments[switch] = mode
        # Flax accepts either the field or the argument.
        changed |= {switch: None} if switch in fields else {}
    else:
        changed[switch] = mode
    if frozen:
        leaves = [id(leaf) for leaf in jax.tree.leaves(module.variables.get("params", {}))]
        made = {name: value for name, value in vars(module).items() if id(value) in leaves}
        changed |= {name: lax.stop_gradient(value) for name, value in made.items()}
        param = module.param
        changed["param"] = lambda *given, **options: lax.stop_gradient(param(*given, **options))
    with _changed(module, changed):
        return next_fun(*copy.bound.args[1:], **copy.bound.kwargs)


def _fields_of(module: Any) -> dict[str, Any]:
    return {field.name: getattr(module, field.name, None) for field in dataclasses.fields(module)}


@contextmanager
def _changed(module: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Gives the module other attributes inside the context; Flax forbids a plain assignment."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in values:
            object.__delattr__(module, name)
        for name, value in before.items():
            object.__setattr__(module, name, value)
