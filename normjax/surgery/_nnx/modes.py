"""How the batch norms of an NNX model act: frozen, synchronized over devices, guarded."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from normjax import _errors
from normjax.surgery._nnx.layers import batch_norms, copied, names, pass_through, read
from normjax.surgery._paths import params_of, written
from normjax.surgery._refused import expect_updated, refuse_training


def freeze(model: Any, at: tuple[str, ...] | None) -> Any:
    """`normjax.surgery.freeze`."""
    copy, layers = copied(model, at)
    for layer in layers.values():
        layer.frozen = True
    return copy


def frozen_mask(model: nnx.Module, at: tuple[str, ...] | None) -> Any:
    """`normjax.surgery.frozen_mask`."""
    frozen = set(batch_norms(model, at))

    def belongs(path: tuple, _: Any) -> bool:
        keys = names(tuple(getattr(key, "key", key) for key in path))
        return any(keys[: len(norm)] == norm for norm in frozen)

    return jax.tree_util.tree_map_with_path(belongs, params_of(model))


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
        expect_updated(written(path), _statistics(layer))
        pass_through(layer, _Guarded)
        layer.normjax_path = written(path)
    return copy


class _Guarded(nnx.Module):
    """Fails where the layer would train, or normalize by statistics that were never updated."""

    normjax_path: str

    @_errors.named("normjax.surgery.guard", runs_model=True)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = super().__call__
        if read(self, call, args, kwargs).train:
            remedy = "Call model.eval() first, or freeze it: guard(freeze(model))."
            refuse_training(self.normjax_path, remedy)
        expect_updated(self.normjax_path, _statistics(self))
        return call(*args, **kwargs)


def _statistics(layer: Any) -> dict[str, Any]:
    held = {name: getattr(layer, name, None) for name in ("mean", "var", "count")}
    return {name: v.get_value() for name, v in held.items() if v is not None}
