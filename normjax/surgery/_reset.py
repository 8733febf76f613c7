"""Resets running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from normjax import _errors
from normjax.surgery._paths import At, Tree, is_nnx, norms, patterns, with_stats

START = {"mean": 0, "var": 1, "count": 0}


@_errors.named("normjax.surgery.reset")
def reset(variables: Tree, *, at: At = None) -> Tree:
    """Resets running statistics to those of a new layer.

        mean = 0,   var = 1,   count = 0

    Args:
        variables: all variables of the model; or a model of flax.nnx.
        at: patterns over the paths of the layers, all if None.

    Returns:
        New variables, in a dictionary of the same type; or a copy of the model.

    Guarantees:
        nothing else: parameters and other layers are the same array objects.

    Raises:
        TypeError: `variables` is neither a dictionary nor a model of NNX.
        ValueError: there are no statistics, or a pattern matches none (they are listed).

    References:
        Ioffe, Szegedy (2015), arXiv:1502.03167.

    Example:
        >>> import jax.numpy as jnp
        >>> from normjax import surgery
        >>> stats = {"mean": jnp.array([3.0]), "var": jnp.array([5.0])}
        >>> surgery.reset({"batch_stats": {"bn": stats}})["batch_stats"]["bn"]["var"]
        Array([1.], dtype=float32)
    """
    if is_nnx(variables):
        from normjax.surgery._nnx.layers import with_statistics

        return with_statistics(variables, lambda held: reset(held, at=at), patterns(at))
    found = norms(variables, at)

    def start(node: Mapping[str, Any]) -> dict[str, Any]:
        return {n: jnp.full_like(node[n], value) for n, value in START.items() if n in node}

    return with_stats(variables, {path: start(node) for path, node in found.items()})
