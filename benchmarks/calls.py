"""Builds calls to time from the layers of a library, and times many calls interleaved."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

TRAINING, EVALUATION = "training step", "evaluation"
MODES = (TRAINING, EVALUATION)

# How long a call runs untimed before it is timed. The threads of the previous library spin after
# their work (PyTorch's for 6 to 9 ms), and idle cores take up to 25 ms to reach full speed: after a
# pause, the first five training steps of a batch norm took 1.8, 1.4, 1.3, 1.2 and 1.1 times as long
# as the tenth.
WARM_UP_SECONDS = 0.03
COMPILATIONS = 2


class Call(NamedTuple):
    """A call to time, and its properties that need no timing.

    `run` returns when the work is done. `values` returns y, and dx in training, as float32 with
    features last, so that the results of libraries can be compared.
    """

    run: Callable[[], Any]
    values: Callable[[], list[np.ndarray]] = list
    compile_seconds: float | None = None
    kept_bytes: int | None = None
    temporary_bytes: int | None = None


class Module(NamedTuple):
    """A layer of a JAX library: `apply(params, state, x, train)` returns y and the next state."""

    apply: Callable[[Any, Any, jax.Array, bool], tuple[jax.Array, Any]]
    params: Any
    state: Any = None
    channels_first: bool = False


def jax_calls(module: Module, x: jax.Array, dy: jax.Array) -> dict[str, Call]:
    if module.channels_first:
        x, dy = jnp.moveaxis(x, -1, 1), jnp.moveaxis(dy, -1, 1)

    def forward(params, state, x):
        return jax.vjp(lambda p, x: module.apply(p, state, x, True), params, x, has_aux=True)

    def training_step(params, state, x, dy):
        y, pullback, state = forward(params, state, x)
        d_params, dx = pullback(dy)
        return (y, dx), d_params, state

    def evaluation(params, state, x):
        return ((module.apply(params, state, x, False)[0]),)

    def values(run):
        arrays = run()[0]
        arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        arrays = [np.asarray(a, np.float32) for a in arrays]
        return [np.moveaxis(a, 1, -1) for a in arrays] if module.channels_first else arrays

    given = module.params, module.state, x
    kept = kept_bytes(lambda *args: forward(*args)[1], *given)
    calls = {}
    for mode, function, args in (
        (TRAINING, training_step, (*given, dy)),
        (EVALUATION, evaluation, given),
    ):
        compiled, seconds = compile_(function, *args)

        def run(compiled=compiled, args=args):
            return jax.block_until_ready(compiled(*args))

        calls[mode] = Call(
            run,
            lambda run=run: values(run),
            seconds,
            kept if mode == TRAINING else None,
            compiled.memory_analysis().temp_size_in_bytes,
        )
    return calls


def compile_(function: Callable, *args: Any) -> tuple[Callable, float]:
    """The compiled function, and the seconds for tracing, lowering and compiling it.

    The least of several times, since the first compilation includes a library's one-time setup.
    """

    def timed():
        jax.clear_caches()
        start = time.perf_counter()
        compiled = jax.jit(lambda *args: function(*args)).lower(*args).compile()
        return compiled, time.perf_counter() - start

    return min((timed() for _ in range(COMPILATIONS)), key=lambda found: found[1])


def kept_bytes(pullback: Callable, *args: Any) -> int:
    """The bytes that the forward pass keeps for the backward pass, including the parameters.

    The leaves of a pullback are its residuals. An array that occurs twice counts once.
    """
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(pullback(*args)))(*args).jaxpr
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


def copy_call(nbytes: int) -> Call:
    """A call that reads and writes that many bytes and computes nothing: the memory bandwidth."""
    x = jnp.zeros(nbytes // 4, jnp.float32)
    compiled, seconds = compile_(lambda x: x + 1, x)
    return Call(lambda: jax.block_until_ready(compiled(x)), compile_seconds=seconds)


def interleave(
    calls: dict[Hashable, Call], repeats: int, seconds: float
) -> dict[Hashable, list[float]]:
    """Seconds of each call. A round runs every call once, in a new random order.

    So a machine that slows down affects all calls equally. Before each timed call the same call
    runs untimed, so that its threads are awake and cores at full speed, as between the layers of a
    network. Rounds continue until there are at least `repeats` of them and `seconds` have passed.
    """
    times: dict[Hashable, list[float]] = {key: [] for key in calls}
    order, rounds = list(calls), 0
    for call in calls.values():
        call.run()
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    while rounds < repeats or time.perf_counter() < end:
        random.shuffle(order)
        for key in order:
            warm = time.perf_counter() + WARM_UP_SECONDS
            while time.perf_counter() < warm:
                calls[key].run()
            start = time.perf_counter()
            calls[key].run()
            times[key].append(time.perf_counter() - start)
        rounds += 1
    gc.enable()
    return times
