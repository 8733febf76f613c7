"""Exact statistics of the population in place of the running averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from normjax.surgery._paths import At, Variables, at_path, with_stats
from normjax.surgery._walk import walk


def recompute(
    call: Callable,
    variables: Variables,
    batches: Iterable[Any],
    *,
    at: At = None,
    limit: int | None = None,
    progress: bool = True,
) -> Variables:
    """Statistics of all that the batch norms see in `batches` ("precise batch norm").

        mean = sum of x / count,   var = sum of |x - mean|^2 / (count - ddof)

    over all entries of all batches that count. A running average weighs the last batches most,
    and an average of variances leaves out how the means of the batches differ; this does neither.

    Args:
        call: `call(variables, batch, *, train, mutable)` runs the model and returns what
            `model.apply` does. It is compiled, so it must be pure: dropout keys come in batches.
        variables: all of the model.
        batches: whatever `call` takes, cut as in training, since each layer is measured behind
            layers that normalize by the batch. The sizes may differ.
        at: patterns over the paths of the layers, all if None.
        limit: how many batches at most.
        progress: a bar, where there is a terminal.

    Returns:
        New variables; only the statistics of the chosen layers differ.

    Guarantees:
        exact: population moments to float32 rounding, whatever the offsets, drift and sizes.
        cut as you like: the result does not depend on the cuts where the layer's input does not.
        any devices: also over an `axis_name` that is bound within `call`, and sharded arrays.
        any model: layers of Flax and of normjax, also inside jit, remat, scan and vmap of Flax.
        pure: the variables that were given stay as they are, also when something fails.

    Edge cases:
        ===================================  ==================================================
        feature with every entry masked      its statistics stay
        layer that is frozen inside call     its statistics stay
        layer that runs twice                both its inputs are taken in
        count beside mean and var            the number of batches
        ===================================  ==================================================

    Raises:
        TypeError: `variables` is no dictionary, `batches` cannot be walked through, or `call`
            returns no updates.
        ValueError: no batches, no batch norm, none in training mode, a pattern that matches none,
            data that are not finite, batches that the model does not take.

    References:
        Wu, Johnson (2021), Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from normjax import surgery
        >>> model = nn.BatchNorm()
        >>> def call(variables, batch, *, train, mutable=False):
        ...     return model.apply(variables, batch, use_running_average=not train, mutable=mutable)
        >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0], [5.0]])]
        >>> variables = model.init(jax.random.key(0), batches[0], use_running_average=True)
        >>> surgery.recompute(call, variables, batches)["batch_stats"]["var"]
        Array([2.], dtype=float32)
    """
    called = "normjax.surgery.recompute"
    records = walk(called, call, variables, batches, at, limit, progress)
    stats = variables["batch_stats"]
    changed = {path: record.stats(at_path(stats, path)) for path, record in records.items()}
    return with_stats(variables, changed)
