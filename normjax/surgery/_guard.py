"""A wrapper for serving that fails where a batch norm would give a wrong answer silently."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax

from normjax import _errors
from normjax.surgery._layers import Edit, Layer, wrap
from normjax.surgery._paths import Apply, At, chosen, is_nnx, nodes, patterns, written
from normjax.surgery._refused import expect_updated, refuse_training


@_errors.named("normjax.surgery.guard")
def guard(apply: Apply, *, at: At = None) -> Apply:
    """Fails when a batch norm would run in training mode, or by statistics never updated.

        allowed: train=False, and statistics other than mean = 0, var = 1, count = 0

    The mode is known while JAX traces, statistics are known outside of jit. So guard the compiled
    function, which sees both: `serve = guard(jax.jit(model.apply, static_argnames="train"))`.
    Under jit, `jax.jit(guard(model.apply))`, the values of traced statistics are not looked at.

    Args:
        apply: what runs the model; called as before. As the outermost wrapper it judges what the
            inner ones do: `guard(freeze(model.apply))` lets train=True pass. Or a model of
            flax.nnx, whose statistics are looked at here, and when it is called outside of jit.
        at: as in `freeze`.

    Returns:
        A function of the arguments of `apply`; or a copy of the model, to be called after
        `model.eval()`.

    Guarantees:
        before anything runs: statistics are looked at before the model is called.
        output unchanged: what passes is the output of `apply` itself.

    Edge cases:
        ===================================  ==================================================
        statistics traced by jit             the mode alone is looked at
        statistics seen before               looked at once; in NNX at each call outside of jit
        copy of batch norm                   recognized as in `freeze`
        ===================================  ==================================================

    Raises:
        TypeError: `apply` is a module of linen, or nothing that can be called.
        ValueError: when called: training mode, statistics never updated, no batch norm (as in a
            model that is not of Flax), a module with a mean and a var that is not
            recognized, or a pattern that matches none.

    References:
        Wu, Johnson (2021), Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3.

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
                    if chosen(written(path), given):
                        expect_updated(written(path), node)
                seen[:] = leaves
        return run(*args, **kwargs)

    return cast(Apply, guarded)


class _Guard(Edit):
    called = "normjax.surgery.guard"

    def __call__(self, layer: Layer) -> Layer:
        if layer.train:
            remedy = "Call the model with train=False (use_running_average=True)"
            refuse_training(layer.path, f"{remedy}, or freeze it: guard(freeze(apply)).")
        expect_updated(layer.path, layer.stats()._asdict())
        return layer
