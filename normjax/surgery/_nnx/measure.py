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
from normjax.surgery._paths import Path, written

# The whole state of the model, beside its parameters and statistics by path.
STATE = "state"

# What runs the model where it cannot be called with a batch itself.
Call = Callable[[Any, Any], Any]


class _Accumulator(nnx.BatchStat):
    """What a layer saw. Wherever a transformation takes the statistics, it takes this too."""


class Measured:
    """A model with measuring layers, and as it serves: what `Compiled` is for linen.

    Attributes:
        measure: what measures.
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
            # Each batch has keys of its own for dropout.
            count.set_value(count.get_value() + number * 2**16)
        layers = known_batch_norms(model)
        for path, layer in layers.items():
            adopt(layer)
            layer.normjax_observer = Measuring(self.measure, written(path))
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
    """What was compiled, for one walk over batches, which it counts."""

    trains = "the model, after model.train(),"
    remedy = "Look whether it is frozen, or sets the mode of its layers itself."
    takes_part = "pass a function first, lambda model, batch: model(batch[0])"

    def __init__(self, measured: Measured):
        self.measure, self.serve, self._measured = measured.measure, measured.serve, measured
        self._numbers = itertools.count()

    def step(self, variables: Any, centers: Any, batch: Any) -> Seen:
        """What the layers see in a batch."""
        number = jnp.asarray(next(self._numbers), jnp.uint32)
        return self._measured.step(variables, number, centers, batch)


def measured(
    measure: type[Measure], model: nnx.Module, call: Call | None, at: tuple[str, ...] | None
) -> tuple[Run, Any]:
    """What runs the model, and its variables.

    Compiled for each call of a tool: what the methods of a model read beside their arguments, or
    whether an object that it holds has changed, cannot be known.
    """
    for layer in batch_norms(model, at).values():
        expect_arrays(layer)
    graphdef, state = nnx.split(model)
    variables = {**variables_of(model), STATE: pure(state)}
    return Run(Measured(measure, graphdef, call)), variables


class Measuring:
    """Shows the calls of a layer to what measures."""

    def __init__(self, measure: Measure, path: str):
        self.measure, self.path = measure, path

    def __call__(self, layer: Any, call: Any, mode: Any) -> bool:
        """Whether the layer names devices, and the batch at hand is the whole one."""
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
    """A layer with the variables that a module of linen has, of which one is asked for here."""

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
    """The batch norms that are given the output of a layer with a bias, and that layer."""
    graphdef, state = nnx.split(model)
    watch = Watching()

    def run(state: Any, batch: Any) -> Any:
        copy = nnx.merge(graphdef, state)
        modules: dict[Path, Any] = {names(p): module for p, module in nnx.iter_modules(copy)}
        for path, layer in modules.items():
            if _has_bias(layer):
                pass_through(layer, _Makes)
                layer.normjax_made = functools.partial(watch.made, written(path))
            if is_batch_norm(layer):
                adopt(layer)
                layer.normjax_observer = functools.partial(watch.taken, written(path))
        copy.train()
        return (call or (lambda model, batch: model(batch)))(copy, batch)

    jax.eval_shape(run, pure(state), batch)
    return watch.biased


def _has_bias(module: Any) -> bool:
    return isinstance(module, LINEAR) and getattr(module, "bias", None) is not None


class Watching:
    """Follows the outputs of layers with a bias; they are kept, so that no id is given anew."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[Any, str]] = {}
        self.biased: dict[str, str] = {}

    def made(self, path: str, y: Any) -> None:
        """A layer has put out y."""
        self.outputs[id(y)] = y, path

    def taken(self, path: str, layer: Any, call: Any, mode: Any) -> bool:
        """A batch norm is given x."""
        maker = self.outputs.get(id(call.x))
        if maker and mode.train and layer.axis in (-1, jnp.ndim(call.x) - 1):
            self.biased[path] = maker[1]
        return layer.axis_name is not None and not bound_names()


class _Makes(Derived):
    """Tells of its output."""

    normjax_made: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        self.normjax_made(y)
        return y
