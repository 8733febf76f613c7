"""Changes how the batch norms of an NNX model run: frozen, synchronized over devices, guarded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from normjax import _errors
from normjax.surgery._nnx.layers import batch_norms, copied, names
from normjax.surgery._paths import params_of, path_name
from normjax.surgery._refused import expect_usable, refuse_training


def freeze(model: Any, at: tuple[str, ...] | None) -> Any:
    """`normjax.surgery.freeze`."""
    copy, layers = copied(model, at)
    for layer in layers.values():
        layer.frozen = True
    return copy


def frozen_mask(model: nnx.Module, at: tuple[str, ...] | None) -> Any:
    """`normjax.surgery.frozen_mask`."""
    layers = batch_norms(model, at).values()
    # By identity, since layers may share a parameter.
    frozen = {id(v) for layer in layers for v in (layer.scale, layer.bias) if v is not None}
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    marked = {names(path) for path, variable in state if id(variable) in frozen}

    def is_marked(path: tuple, _: Any) -> bool:
        keys = (getattr(key, "key", None) for key in path)
        return names(tuple(key for key in keys if key is not None)) in marked

    return jax.tree_util.tree_map_with_path(is_marked, params_of(model))


def synchronize(model: Any, axis_name: str | tuple[str, ...], at: tuple[str, ...] | None) -> Any:
    """`normjax.surgery.synchronize`."""
    copy, layers = copied(model, at)
    for layer in layers.values():
        layer.axis_name, layer.axis_index_groups = axis_name, None
    return copy


def guard(model: Any, at: tuple[str, ...] | None) -> Any:
    """`normjax.surgery.guard`."""
    copy, layers = copied(model, at)
    for path, layer in layers.items():
        expect_usable(path_name(path), _statistics(layer))
        layer.normjax_observer = Guarding(path_name(path))
    return copy


@dataclass(frozen=True)
class Guarding:
    """Raises if the layer would train, or normalize by statistics that were never updated."""

    path: str

    @_errors.named("normjax.surgery.guard")
    def __call__(self, layer: Any, call: Any, mode: Any) -> bool:
        """Checks one call of the layer."""
        if mode.train:
            remedy = "Call model.eval() first, or freeze it: guard(freeze(model))."
            refuse_training(self.path, remedy)
        expect_usable(self.path, _statistics(layer))
        return False


def _statistics(layer: Any) -> dict[str, Any]:
    held = {name: getattr(layer, name, None) for name in ("mean", "var", "count")}
    return {name: v.get_value() for name, v in held.items() if v is not None}
