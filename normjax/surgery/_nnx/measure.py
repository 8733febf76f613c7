"""An NNX model whose batch norms are measured while it runs, compiled once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from normjax._errors.devices import bound_names
from normjax.surgery._compiled import Records, Seen
from normjax.surgery._layers import Layer
from normjax.surgery._nnx.layers import batch_norms, names, pass_through, read, variables_of
from normjax.surgery._paths import Path, written
from normjax.surgery._record import SLOT, Measure, Record

# The whole state of the model, beside its parameters and statistics by path.
STATE = "state"

# What runs the model where it cannot be called with a batch itself.
Call = Callable[[Any, Any], Any]


class _Record(nnx.BatchStat):
    """What a layer saw. Wherever a transformation takes the statistics, it takes this too."""


class Measured:
    """As `Compiled` for linen: a model with measuring layers, and as it serves.

    Attributes:
        measure: what measures.
        step: `step(variables, centers, batch)` returns what was `Seen`.
        serve: `serve(variables, batch)` returns the outputs in evaluation mode.
    """

    trains = "the model, after model.train(),"
    remedy = "Look whether it is frozen, or sets the mode of its layers itself."
    takes_part = "pass a function first, lambda model, batch: model(batch[0])"

    def __init__(self, measure: type[Measure], graphdef: Any, call: Call | None):
        self.measure = measure()
        self.graphdef = graphdef
        self.call = call or (lambda model, batch: model(batch))
        self.step = jax.jit(self._step)
        self.serve = jax.jit(self._serve)

    def _step(self, variables: Mapping[str, Any], centers: Mapping[Path, Any], batch: Any) -> Seen:
        model = nnx.merge(self.graphdef, variables[STATE])
        layers = batch_norms(model)
        for path, layer in layers.items():
            pass_through(layer, _Measured)
            layer.normjax_measure, layer.normjax_path = self.measure, written(path)
            if path in centers:
                setattr(layer, SLOT, _Record(Record.start(centers[path])))
            if not bound_names():
                # The batch at hand is the whole one.
                layer.axis_name = layer.axis_index_groups = None
        model.train()
        outputs = self.call(model, batch)
        records: Records = {path: getattr(layers[path], SLOT).get_value() for path in centers}
        finite = [jnp.isfinite(r.moments.m2).all() for r in records.values()]
        return Seen(records, outputs, jnp.stack(finite).all())

    def _serve(self, variables: Mapping[str, Any], batch: Any) -> Any:
        model = nnx.merge(self.graphdef, variables[STATE])
        model.eval()
        return self.call(model, batch)


def measured(measure: Any, model: nnx.Module, call: Call | None) -> tuple[Measured, Any]:
    """What runs the model, and its variables.

    A model of one structure is compiled once; one that is run by a function each time.
    """
    graphdef, state = nnx.split(model)
    variables = {**variables_of(model), STATE: state}
    if call is not None:
        return Measured(measure, graphdef, call), variables
    try:
        return _compiled(measure, graphdef), variables
    except TypeError:  # An attribute of the model cannot be hashed.
        return Measured(measure, graphdef, None), variables


@functools.lru_cache(maxsize=8)
def _compiled(measure: type[Measure], graphdef: Any) -> Measured:
    return Measured(measure, graphdef, None)


class _Measured(nnx.Module):
    """Shows the call of a layer to what measures."""

    normjax_measure: Any
    normjax_path: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = super().__call__
        self.normjax_measure(_seen(self, read(self, call, args, kwargs)))
        return call(*args, **kwargs)


def _seen(layer: Any, given: Any) -> Layer:
    return Layer(
        path=layer.normjax_path,
        module=_Slots(layer),
        x=given.x,
        train=given.train,
        mask=given.mask,
        scale=None,
        bias=None,
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
        run=lambda layer: None,
        frozen=getattr(layer, "frozen", False),
    )


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
    made: dict[int, tuple[Any, str]] = {}
    found: dict[str, str] = {}

    def run(state: Any, batch: Any) -> Any:
        copy = nnx.merge(graphdef, state)
        modules = {names(path): module for path, module in nnx.iter_modules(copy)}
        watched: dict[Path, type] = {
            path: _Makes for path, module in modules.items() if _has_bias(module)
        }
        watched |= dict.fromkeys(batch_norms(copy), _Takes)
        for path, mixin in watched.items():
            layer: Any = modules[path]
            pass_through(layer, mixin)
            layer.normjax_path, layer.normjax_watched = written(path), _Watched(made, found)
            if not bound_names() and mixin is _Takes:
                layer.axis_name = layer.axis_index_groups = None
        copy.train()
        return (call or (lambda model, batch: model(batch)))(copy, batch)

    jax.eval_shape(run, state, batch)
    return found


def _has_bias(module: Any) -> bool:
    return isinstance(module, LINEAR) and getattr(module, "bias", None) is not None


class _Watched:
    """The outputs of layers with a bias, kept so that no id is given away; and who takes them."""

    def __init__(self, made: dict[int, tuple[Any, str]], found: dict[str, str]):
        self.made, self.found = made, found


class _Makes(nnx.Module):
    normjax_watched: Any
    normjax_path: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        self.normjax_watched.made[id(y)] = y, self.normjax_path
        return y


class _Takes(nnx.Module):
    normjax_watched: Any
    normjax_path: str
    axis: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = super().__call__
        given = read(self, call, args, kwargs)
        maker = self.normjax_watched.made.get(id(given.x))
        if maker and given.train and self.axis in (-1, jnp.ndim(given.x) - 1):
            self.normjax_watched.found[self.normjax_path] = maker[1]
        return call(*args, **kwargs)
