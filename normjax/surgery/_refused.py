"""The errors of `guard`: training, and statistics that were never updated or are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def never_updated(node: Mapping[str, Any]) -> bool:
    """Whether statistics are those of a new layer; False if jit traces them."""
    leaves = [node[name] for name in ("mean", "var", "count") if node.get(name) is not None]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    if node.get("count") is not None:
        return not np.any(np.asarray(node["count"]))
    return not np.any(np.asarray(node["mean"])) and bool(np.all(np.asarray(node["var"]) == 1))


def refuse_training(path: str, remedy: str) -> None:
    """Raises for a layer in training mode."""
    raise ValueError(
        f"normjax: the batch norm at '{path}' would run in training mode, normalizing each example "
        f"by the others in its batch. {remedy}"
    )


def expect_usable(path: str, node: Mapping[str, Any]) -> None:
    """Raises for statistics of a new layer, or that are not finite."""
    for name in ("mean", "var"):
        leaf = node[name]
        if not isinstance(leaf, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(leaf))):
            raise ValueError(
                f"normjax: the batch norm at '{path}' has a running {name} that is NaN or "
                "infinite. Use normjax.surgery.reset and normjax.surgery.recompute, or load other "
                "statistics."
            )
    if never_updated(node):
        raise ValueError(
            f"normjax: the batch norm at '{path}' has statistics that were never updated "
            "(mean 0, var 1), so it would not normalize. Train (linen: with "
            "mutable=['batch_stats'], and keep the updates), load them with the parameters, or use "
            "normjax.surgery.recompute."
        )
