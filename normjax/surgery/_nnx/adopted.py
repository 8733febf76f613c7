"""Layers that replace a model's own layers, and accept the same calls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import normjax.nnx
from normjax.nnx._batch import _BatchNorm


class BatchNorm(normjax.nnx.BatchNorm, nnx.BatchNorm):  # type: ignore[misc]
    """A layer of Flax that runs the code of normjax; filters by either class match it."""


class Derived(nnx.Module):
    """A base of classes derived from a user's class; skips the user's `__init_subclass__`."""

    def __init_subclass__(cls, **options: Any) -> None:
        own: Any = nnx.Module.__init_subclass__
        own.__func__(cls, **options)


def adopt(layer: Any) -> None:
    """Makes a layer of Flax run the code of normjax; missing fields get defaults."""
    if isinstance(layer, _BatchNorm):
        return
    for field in dataclasses.fields(BatchNorm):
        if not hasattr(layer, field.name):
            setattr(layer, field.name, field.default)
    kind: Any = type(layer)
    layer.__class__ = BatchNorm if kind is nnx.BatchNorm else _extending(kind)


@functools.cache
def _extending(kind: type) -> type:
    """The class for a subclass of Flax's layer that does not override `__call__`."""

    def reduce(layer: Any) -> Any:
        return _restored, (kind, dict(vars(layer)))

    name = {"__module__": kind.__module__, "__reduce__": reduce}
    return type(kind.__name__, (Derived, normjax.nnx.BatchNorm, kind), name)


def _restored(kind: type, values: dict[str, Any]) -> Any:
    layer: Any = object.__new__(_extending(kind))
    vars(layer).update(values)
    return layer


@dataclass(eq=False, repr=False)
class GroupNorm(normjax.nnx.GroupNorm):
    """A group norm in place of a batch norm; it ignores the mode of a call."""

    _: KW_ONLY
    activation: Callable[[Array], Array] | None = None

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        train: bool | None = None,
        **options: Any,
    ) -> Array:
        """Normalizes `x`, and activates it as the batch norm did."""
        y = super().__call__(x, **options)
        return y if self.activation is None else self.activation(y)
