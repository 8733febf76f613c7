"""Replaces running averages by exact statistics of many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import numpy as np

from normjax import _errors
from normjax.surgery._accumulator import DID_NOT_RUN, Measure
from normjax.surgery._batches import over_batches
from normjax.surgery._compiled import Accumulators, Seen
from normjax.surgery._paths import At, Tree, at_path, path_name, patterns, with_stats
from normjax.surgery._source import source


@overload
def recompute(
    call: Callable[..., Any],
    variables: Tree,
    batches: Iterable[Any],
    *,
    at: At = None,
    limit: int | None = None,
    progress: bool = True,
) -> Tree: ...


@overload
def recompute(
    call: Tree,
    variables: Iterable[Any],
    /,
    *,
    at: At = None,
    limit: int | None = None,
    progress: bool = True,
) -> Tree: ...


@_errors.named("normjax.surgery.recompute", runs_model=True)
def recompute(
    call: Any,
    variables: Any = None,
    batches: Iterable[Any] | None = None,
    *,
    at: At = None,
    limit: int | None = None,
    progress: bool = True,
) -> Any:
    """Recomputes the statistics of batch norms exactly over `batches` ("precise batch norm").

        mean = sum of x / count,   var = sum of |x - mean|^2 / (count - ddof)

    over all entries of all batches that count. A running average weights the last batches most, and
    an average of variances ignores the differences between the means of batches. This function has
    neither problem.

    Args:
        call: `call(variables, batch, *, train, mutable)` runs the model and returns what
            `model.apply` does. It is compiled once, as by `jax.jit`, so it must be pure: dropout
            keys come in batches.
        variables: all variables of the model. For a model of flax.nnx, call `recompute(model,
            batches)`, which runs it after `model.train()`; or `recompute(call, model, batches)`
            with `call(model, batch)`.
        batches: an iterable of batches for `call`, of the size in training, since layers before a
            measured layer normalize by the batch. Sizes may differ. For one batch pass `[batch]`.
        at: patterns over the paths of the layers, all if None.
        limit: the maximal number of batches.
        progress: whether to show a progress bar in a terminal.

    Returns:
        New variables, or a copy of the model; only the statistics of the chosen layers differ.

    Guarantees:
        exact: population moments to float32 rounding, for any offsets, drift and sizes.
        cut as you like: the result depends on batch sizes only if the layer's input does.
        any devices: also over an `axis_name` that is bound within `call`, and sharded arrays.
        unbound axis: if a layer has an `axis_name` and no axis is bound, each batch is whole.
        any model: layers of Flax and of normjax, also inside jit, remat, scan and vmap of Flax;
            copies of them as in `freeze`.
        nothing left out: a chosen layer that was not measured is an error that names it.
        compiled once: a second call with the same function and shapes compiles nothing. A model of
            NNX is compiled in each call, since changes of what its methods read are not known.
        pure: the given variables are not changed, also when something fails.

    Edge cases:
        ===================================  ==================================================
        feature with every entry masked      its statistics stay
        layer that is frozen inside call     its statistics stay
        model of NNX that is frozen whole    an error, since nothing would be measured
        layer that runs twice                both its inputs are measured
        count beside mean and var            the number of batches
        ===================================  ==================================================

    Raises:
        TypeError: `call` is not a function, or does not take train and mutable; `variables` is not
            a dictionary; `batches` is one batch, an array, a dictionary or a tuple, or does not
            consist of arrays; `call` does not take a batch, or returns no updates.
        ValueError: no batches, no batch norm, a chosen one that ran in evaluation mode, not at
            all, or is not recognized, a pattern that matches none, data that are not finite,
            batches that the model does not take.

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
    held = source(Measure, call, variables, batches, at)
    run, given = held.run, patterns(at)

    def each(seen: Seen, batch: Any) -> None:
        # A layer that did not run yet may run in a later batch.
        _expect_measured(run, seen.records, given, ran_only=True)

    records = over_batches(run, held.variables, held.batches, at, limit, progress, each)
    _expect_measured(run, records, given)
    stats = held.variables["batch_stats"]
    changed = {path: record.stats(at_path(stats, path)) for path, record in records.items()}
    return held.result(with_stats(held.variables, changed), at)


def _expect_measured(
    run: Any, records: Accumulators, at: tuple[str, ...] | None, ran_only: bool = False
) -> None:
    """Raises if the statistics of a chosen layer would not change."""
    measure = run.measure
    faults = {path_name(path): measure.fault(path_name(path), r) for path, r in records.items()}
    wrong = {path: fault for path, fault in faults.items() if fault}
    wrong |= measure.elsewhere(at, records)
    if ran_only:
        wrong = {path: fault for path, fault in wrong.items() if fault != DID_NOT_RUN}
    if not any(np.any(record.batches) for record in records.values()) and (wrong or not ran_only):
        raise ValueError(
            f"normjax: {run.trains} ran none of the batch norms {sorted(faults)} in training mode. "
            f"{run.remedy}"
        )
    if wrong:
        listed = "; ".join(f"'{path}' {fault}" for path, fault in sorted(wrong.items()))
        raise ValueError(
            f"normjax: {len(wrong)} chosen batch norms were not measured, so their "
            f"statistics would not change: {listed}. Check that the model passes train to all of "
            "its layers. To keep some of them unchanged, name the others: at=."
        )
