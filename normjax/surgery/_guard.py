"""A wrapper for serving that fails where a batch norm would give a wrong answer silently."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax

from normjax import _errors
from normjax.surgery._layers import Edit, Layer, wrap
from normjax.surgery._paths import Apply, At, chosen, is_nnx, nodes, path_name, patterns
from normjax.surgery._refused import expect_usable, refuse_training


@_errors.named("normjax.surgery.guard")
def guard(apply: Apply, *, at: At = None) -> Apply:
    """Raises if a batch norm would run in training mode, or by unusable statistics.

        allowed: train=False, and statistics other than mean = 0, var = 1, count = 0

    The mode is known while JAX traces, statistics are known outside of jit. So guard the compiled
    function, for which both are known: `guard(jax.jit(model.apply, static_argnames="train"))`.
    In `jax.jit(guard(model.apply))`, the values of traced statistics are not checked.

    Args:
        apply: the function that runs the model. Make the guard the outermost wrapper, since it
            checks the result of inner ones: `guard(freeze(model.apply))` allows train=True. Or a
            model of flax.nnx, whose statistics are checked here and in calls outside of jit.
        at: as in `freeze`.

    Returns:
        A function of the arguments of `apply`; or a copy of the model, to be called after
        `model.eval()`.

    Guarantees:
        before anything runs: statistics are checked before the model is called.
        output unchanged: the result is that of `apply` itself.

    Edge cases:
        ===================================  ==================================================
        statistics traced by jit             only the mode is checked
        statistics seen before               checked once; in NNX at each call outside of jit
        copy of batch norm                   recognized as in `freeze`
        ===================================  ==================================================

    Raises:
        TypeError: `apply` is a module of linen, or cannot be called.
        ValueError: when called: training mode, statistics that were never updated or are not
            finite, no batch norm (as in a model that is not of Flax), a module with a mean and a
            var that is not recognized, or a pattern that matches none.

    References:
        Wu, Johnson (2021), Rethinking "Batch" in BatchNorm, arXiv:2105.07576, sections 3 and 4.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from normjax import surgery
        >>> model, x = nn.BatchNorm(), jnp.array([[0.0], [4.0]])
        >>> variables = model.init(jax.random.key(0), x, use_running_average=True)
        >>> variables["batch_stats"]["mean"] += 2.0
        >>> surgery.guard(model.apply)(variables, x, use_running_average=True).round(2).ravel()
        Array([-2.,  2.], dtype=float32)
    """
    given = patterns(at)
    if is_nnx(apply):
        from normjax.surgery._nnx import modes

        return modes.guard(apply, given)
    run = wrap(apply, _Guard, given)
    seen: list[Any] = []

    @functools.wraps(apply)
    @_errors.named(_Guard.called, runs_model=True)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            stats = value.get("batch_stats") if isinstance(value, Mapping) else None
            leaves = jax.tree.leaves(stats)
            same = len(leaves) == len(seen) and all(
                a is b for a, b in zip(leaves, seen, strict=True)
            )
            if leaves and not same:
                for path, node in nodes(stats).items():
                    if chosen(path_name(path), given):
                        expect_usable(path_name(path), node)
                seen[:] = leaves
        return run(*args, **kwargs)

    return cast(Apply, guarded)


class _Guard(Edit):
    called = "normjax.surgery.guard"

    def __call__(self, layer: Layer) -> Layer:
        if layer.train:
            remedy = "Call the model with train=False (use_running_average=True)"
            refuse_training(layer.path, f"{remedy}, or freeze it: guard(freeze(apply)).")
        expect_usable(layer.path, layer.stats()._asdict())
        return layer
