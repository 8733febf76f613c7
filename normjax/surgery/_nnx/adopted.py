"""Layers that stand in the place of a model's own ones, and are called as those are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import normjax.nnx


class BatchNorm(normjax.nnx.BatchNorm, nnx.BatchNorm):  # type: ignore[misc]
    """A layer of Flax that runs by the code of normjax; filters by either class find it."""


@dataclass(eq=False, repr=False)
class GroupNorm(normjax.nnx.GroupNorm):
    """A group norm in the place of a batch norm: the mode that it is called with says nothing."""

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
