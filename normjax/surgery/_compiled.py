"""Compiles a function `call` once, and finds it again the next time."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from normjax.surgery._accumulator import SLOT, Accumulator, Measure
from normjax.surgery._kept import Kept
from normjax.surgery._layers import editing, expect_function
from normjax.surgery._paths import Path, at_path, with_stats

Accumulators = dict[Path, Accumulator]

CALL = (
    "def call(variables, batch, *, train, mutable=False):\n"
    "    return model.apply(variables, batch, use_running_average=not train, mutable=mutable)"
)

_compiled = Kept()


class Seen(NamedTuple):
    """One batch: the records of the layers, the outputs of the model, whether all is finite."""

    records: Accumulators
    outputs: Any
    finite: Any


class Compiled:
    """A call with measuring layers, and in evaluation.

    Attributes:
        measure: the edit that measures.
        step: `step(variables, centers, batch)` returns what was `Seen`.
        serve: `serve(variables, batch)` returns the outputs in evaluation mode.
    """

    # For errors: what trains, what to check if it did not, how to take a part of a batch.
    trains = "call(..., train=True)"
    remedy = "Pass train to the model, and check that it passes train to its layers."
    takes_part = "take that part in call, model.apply(variables, batch[0], ...)"

    def __init__(self, measure: type[Measure], call: Callable):
        self.measure = measure()
        self.reads = tuple(map(_reference, _read_by(call, set())))
        # The cache of jit must not keep `call` alive, with all that it holds.
        method = isinstance(call, MethodType)
        alive = weakref.WeakMethod(call) if method else _reference(call)
        self.step = jax.jit(functools.partial(_step, alive, self.measure))
        self.serve = jax.jit(functools.partial(_serve, alive))

    def holds(self, call: Callable) -> bool:
        """Whether `call` still reads the same objects, so that its traces are valid."""
        now = tuple(_read_by(call, set()))
        same = len(now) == len(self.reads)
        return same and all(old() is new for old, new in zip(self.reads, now, strict=True))


def compiled(measure: type[Measure], call: Callable) -> Compiled:
    """The compiled `call`, cached while it is alive and reads the same objects."""
    expect_function(call, f"a function that runs the model, such as\n{CALL}")
    make = functools.partial(Compiled, measure, call)
    owner: Any = call
    key: tuple[Any, ...] = (measure,)
    if isinstance(call, MethodType) and isinstance(call.__self__, nn.Module):
        # Modules of linen are frozen, and each access of `model.apply` makes a new method.
        owner, key = call.__self__, (measure, call.__func__)
    elif not isinstance(call, FunctionType | functools.partial):
        return make()  # It is not known what other objects read.
    found = _compiled.get(owner, key, make)
    if not found.holds(call):
        _compiled.forget(owner, key)
        found = _compiled.get(owner, key, make)
    return found


def _step(alive: Callable, measure: Measure, variables: Any, centers: Any, batch: Any) -> Seen:
    call = alive()
    slots = {path: {SLOT: Accumulator.start(center)} for path, center in centers.items()}
    with editing(measure):
        out = call(with_stats(variables, slots), batch, train=True, mutable=["batch_stats"])
    try:
        outputs, updates = out
        records = {path: at_path(updates["batch_stats"], path)[SLOT] for path in slots}
    except (TypeError, ValueError, KeyError, IndexError):
        raise TypeError(
            "normjax: call(variables, batch, train=True, mutable=['batch_stats']) must "
            "return (outputs, updates) with the updated 'batch_stats', as model.apply does. "
            "Pass mutable to it: model.apply(variables, ..., train=train, mutable=mutable)."
        ) from None
    finite = [jnp.isfinite(r.moments.m2).all() for r in records.values()]
    return Seen(records, outputs, jnp.stack(finite).all())


def _serve(alive: Callable, variables: Mapping[str, Any], batch: Any) -> Any:
    return alive()(variables, batch, train=False, mutable=False)


def _reference(value: Any) -> Callable[[], Any]:
    """A weak reference if the value supports one, else a strong one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _read_by(function: Any, done: set[int]) -> Iterator[Any]:
    """The objects, other than arguments, that a function and functions of its file read."""
    if isinstance(function, functools.partial):
        yield from _read_by(function.func, done)
    if not isinstance(function, FunctionType) or id(function) in done:
        return
    done.add(id(function))
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    names = dict.fromkeys(_names(function.__code__))
    read = [function.__globals__[name] for name in names if name in function.__globals__]
    for value in (*cells, *read, *(function.__defaults__ or ())):
        yield value
        if getattr(value, "__globals__", None) is function.__globals__:
            yield from _read_by(value, done)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not NotImplemented
    except ValueError:
        return False
