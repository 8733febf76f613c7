"""An NNX model whose batch norms are measured while it runs, compiled once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from normjax._errors.devices import bound_names
from normjax.surgery._accumulator import SLOT, Accumulator, Measure
from normjax.surgery._compiled import Accumulators, Seen
from normjax.surgery._layers import Layer
from normjax.surgery._nnx.adopted import Derived, adopt
from normjax.surgery._nnx.layers import (
    batch_norms,
    expect_arrays,
    is_batch_norm,
    known_batch_norms,
    names,
    pass_through,
    pure,
    variables_of,
)
from normjax.surgery._paths import Path, path_name

# The key of the whole state of the model, in addition to parameters and statistics by path.
STATE = "state"

# Runs a model that cannot be called with a batch itself.
Call = Callable[[Any, Any], Any]


class _Accumulator(nnx.BatchStat):
    """The record of a layer; a BatchStat, so that transformations treat it like statistics."""


class Measured:
    """A model with measuring layers, and in evaluation: the counterpart of `Compiled`.

    Attributes:
        measure: the edit that measures.
        step: `step(variables, number, centers, batch)` returns what was `Seen`.
        serve: `serve(variables, batch)` returns the outputs in evaluation mode.
    """

    def __init__(self, measure: type[Measure], graphdef: Any, call: Call | None):
        self.measure = measure()
        self.graphdef = graphdef
        self.call = call or (lambda model, batch: model(batch))
        self.step = jax.jit(self._step)
        self.serve = jax.jit(self._serve)

    def _step(
        self,
        variables: Mapping[str, Any],
        number: Any,
        centers: Mapping[Path, Any],
        batch: Any,
    ) -> Seen:
        model = nnx.merge(self.graphdef, variables[STATE])
        for _, count in nnx.to_flat_state(nnx.state(model, nnx.RngCount)):
            # Each batch has its own keys for dropout.
            count.set_value(count.get_value() + number * 2**16)
        layers = known_batch_norms(model)
        for path, layer in layers.items():
            adopt(layer)
            layer.normjax_observer = Measuring(self.measure, path_name(path))
            if path in centers:
                setattr(layer, SLOT, _Accumulator(Accumulator.start(centers[path])))
        model.train()
        outputs = self.call(model, batch)
        records: Accumulators = {path: getattr(layers[path], SLOT).get_value() for path in centers}
        finite = [jnp.isfinite(r.moments.m2).all() for r in records.values()]
        return Seen(records, outputs, jnp.stack(finite).all())

    def _serve(self, variables: Mapping[str, Any], batch: Any) -> Any:
        model = nnx.merge(self.graphdef, variables[STATE])
        model.eval()
        return self.call(model, batch)


class Run:
    """A compiled model, for one pass over batches, which it counts."""

    trains = "the model, after model.train(),"
    remedy = "Check whether it is frozen, or sets the mode of its layers itself."
    takes_part = "pass a function first, lambda model, batch: model(batch[0])"

    def __init__(self, measured: Measured):
        self.measure, self.serve, self._measured = measured.measure, measured.serve, measured
        self._numbers = itertools.count()

    def step(self, variables: Any, centers: Any, batch: Any) -> Seen:
        """The records, outputs and finiteness of one batch."""
        number = jnp.asarray(next(self._numbers), jnp.uint32)
        return self._measured.step(variables, number, centers, batch)


def measured(
    measure: type[Measure], model: nnx.Module, call: Call | None, at: tuple[str, ...] | None
) -> tuple[Run, Any]:
    """The `Run` of a model, and its variables.

    Compiled for each call of a tool: changes of the objects that a model holds, or that its methods
    read, cannot be detected.
    """
    for layer in batch_norms(model, at).values():
        expect_arrays(layer)
    graphdef, state = nnx.split(model)
    variables = {**variables_of(model), STATE: pure(state)}
    return Run(Measured(measure, graphdef, call)), variables


class Measuring:
    """Passes the calls of a layer to a `Measure`."""

    def __init__(self, measure: Measure, path: str):
        self.measure, self.path = measure, path

    def __call__(self, layer: Any, call: Any, mode: Any) -> bool:
        """Whether the layer names devices although this batch is the whole batch."""
        seen = Layer(
            path=self.path,
            module=_Slots(layer),
            x=call.x,
            train=mode.train,
            mask=call.mask,
            scale=None,
            bias=None,
            axis_name=layer.axis_name,
            axis_index_groups=layer.axis_index_groups,
            run=lambda layer: None,
            frozen=layer.frozen,
        )
        return self.measure(seen).axis_name is not seen.axis_name


class _Slots:
    """A layer with the variable methods of a linen module."""

    def __init__(self, layer: Any):
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def has_variable(self, collection: str, name: str) -> bool:
        return hasattr(self._layer, name)

    def get_variable(self, collection: str, name: str) -> Any:
        return getattr(self._layer, name).get_value()

    def put_variable(self, collection: str, name: str, value: Any) -> None:
        getattr(self._layer, name).set_value(value)

    def is_mutable_collection(self, collection: str) -> bool:
        return True


LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)


def biased(model: nnx.Module, call: Call | None, batch: Any) -> dict[str, str]:
    """The batch norms that follow a layer with a bias, and that layer."""
    graphdef, state = nnx.split(model)
    watch = Watching()

    def run(state: Any, batch: Any) -> Any:
        copy = nnx.merge(graphdef, state)
        modules: dict[Path, Any] = {names(p): module for p, module in nnx.iter_modules(copy)}
        for path, layer in modules.items():
            if _has_bias(layer):
                pass_through(layer, _Makes)
                layer.normjax_made = functools.partial(watch.made, path_name(path))
            if is_batch_norm(layer):
                adopt(layer)
                layer.normjax_observer = functools.partial(watch.taken, path_name(path))
        copy.train()
        return (call or (lambda model, batch: model(batch)))(copy, batch)

    jax.eval_shape(run, pure(state), batch)
    return watch.biased


def _has_bias(module: Any) -> bool:
    return isinstance(module, LINEAR) and getattr(module, "bias", None) is not None


class Watching:
    """Tracks the outputs of layers with a bias; they are kept, so that no id is reused."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[Any, str]] = {}
        self.biased: dict[str, str] = {}

    def made(self, path: str, y: Any) -> None:
        """Called for each output y of a layer."""
        self.outputs[id(y)] = y, path

    def taken(self, path: str, layer: Any, call: Any, mode: Any) -> bool:
        """Called for each call of a batch norm."""
        maker = self.outputs.get(id(call.x))
        if maker and mode.train and layer.axis in (-1, jnp.ndim(call.x) - 1):
            self.biased[path] = maker[1]
        return layer.axis_name is not None and not bound_names()


class _Makes(Derived):
    """Reports its output."""

    normjax_made: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        self.normjax_made(y)
        return y
