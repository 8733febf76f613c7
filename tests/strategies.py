"""Strategies for random tests: axes, difficult inputs, number of examples, eager or jit."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16", "float16")


MANY = int(os.environ.get("NORMJAX_EXAMPLES", "0"))


def examples(some, tests):
    """`some` fixed examples, or this test's share of NORMJAX_EXAMPLES new ones among `tests` tests.

    Health checks are off, since the first example of each shape compiles.
    """
    return hypothesis.settings(
        max_examples=-(-MANY // tests) or some,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# Eager execution uses the same derivative rules as jit and compiles each operation once for each
# shape: 20 times as many examples in the same time. Some examples run under jit, which fuses and
# lowers differently. The few fixed examples all do, since one program compiles faster than all of
# its operations.
how_to_run = st.sampled_from(["eager"] * 15 + ["jit"] if MANY else ["jit"])


def runs(how):
    """The context and the transformation in which an example runs."""
    if how == "jit":
        return contextlib.nullcontext(), jax.jit
    return jax.disable_jit(), lambda f: f


# Sets of axes for each rank; few, since each one compiles anew.
SELECTIONS = {
    2: [(1,), (0,), (0, 1)],
    3: [(2,), (1, 2), (1,), (0, 2)],
    4: [(3,), (1, 3), (1, 2, 3)],
    5: [(4,), (1, 3, 4), (0, 1, 4)],
}


def few(choices):
    """All choices, or the first one for the fixed examples, since each one compiles anew."""
    return choices if MANY else choices[:1]


@st.composite
def axes(draw, rank, allowed=lambda chosen: True):
    """Distinct axes in any order, counted from either end; a single one may be an integer."""
    chosen = draw(st.sampled_from(few([c for c in SELECTIONS[rank] if allowed(c)])))
    chosen = draw(st.permutations(chosen))
    spelled = tuple(a - rank if draw(st.booleans()) else a for a in chosen)
    return spelled[0] if len(spelled) == 1 and draw(st.booleans()) else spelled


def canonical(axes, rank):
    """Axes as sorted non-negative integers."""
    axes = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted(a % rank for a in axes))


def hard(draw, rng, shape, reduced, dtype, offset=True):
    """x with one of the properties that break formulas, in `dtype`."""
    x = rng.normal(rng.choice([0.0, 1.0]), rng.choice([0.3, 1.0, 2.0]), shape)
    kinds = ["normal", "offset", "tiny", "constant", "ties", "one differs", "zeros", "large"]
    kind = draw(st.sampled_from(kinds if offset else [k for k in kinds if k != "offset"]))
    of_group = tuple(1 if a in reduced else n for a, n in enumerate(shape))
    some = rng.random(of_group) < 0.5
    if kind == "offset":
        x = x + 1e3
    elif kind == "tiny":
        x = x * 1e-3
    elif kind == "large":
        x = x * 1e3
    elif kind == "constant":
        x = np.where(some, rng.normal(0, 30, of_group), x)
    elif kind == "ties":
        x = rng.integers(-1, 2, shape).astype(float)
    elif kind == "one differs":
        x = np.where(some, (rng.random(shape) < 0.2) * 3.0 + 7.0, x)
    elif kind == "zeros":
        x = np.where(some, 0.0, x)
    return kind, np.asarray(jnp.asarray(x, "float32")) if dtype == "float64" else rounded(x, dtype)


def rounded(x, dtype):
    return np.asarray(x).astype(jnp.dtype(dtype))


def a_mask(draw, rng, x, reduced):
    """The kind of mask; None or a mask of any broadcast shape; x with any masked values."""
    kind = draw(st.sampled_from(["none", "random", "random", "one valid", "none valid"]))
    if kind == "none":
        return kind, None, x
    shape = x.shape
    of = tuple(n if kind == "one valid" or rng.random() < 0.7 else 1 for n in shape)
    mask = rng.random(of) < 0.6
    of_group = tuple(1 if a in reduced else n for a, n in enumerate(shape))
    some = rng.random(of_group) < 0.5
    if kind == "one valid":
        noise = rng.random(shape)
        mask = np.where(some, noise == noise.max(reduced, keepdims=True), mask)
    elif kind == "none valid":
        mask = mask & ~some
    poison = rng.choice([np.nan, np.inf, -np.inf, 5.0], shape)
    masked = ~np.broadcast_to(mask, shape) & (rng.random(shape) < 0.5)
    return kind, mask, np.where(masked, poison.astype(x.dtype), x)


def vector(draw, rng, name, shape):
    """A scale or bias of order one, tiny, big, or with zeros; or None."""
    kind = draw(st.sampled_from(["none", "normal", "normal", "tiny", "big", "with zero"]))
    if kind == "none":
        return None
    v = rng.normal(0, 1, shape)
    if kind == "tiny":
        return v * 1e-3
    if kind == "big":
        return v * 5 - 10 * (name == "bias")
    if kind == "with zero":
        return np.where(rng.random(shape) < 0.5, 0.0, v)
    return v


@dataclass(frozen=True)
class Call:
    """`ours(*inputs)` returns a tuple of arrays, `exact` the same from hyper-dual numbers.

    `shapes` are those of the inputs of `exact`, which have the rank of x.
    """

    name: str
    options: dict[str, Any]
    ours: Callable
    exact: Callable
    inputs: tuple[Any, ...]
    directions: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    within: tuple[int, ...]
    mask: Any
    seed: int
    how: str

    def __repr__(self):
        short = {k: np.asarray(v, np.float64).tolist() for k, v in enumerate(self.inputs[1:], 1)}
        return (
            f"{self.name}({self.options}) {self.how} seed={self.seed} {self.inputs[0].dtype}"
            f"{self.inputs[0].shape} x={np.asarray(self.inputs[0], np.float64).ravel().tolist()} "
            f"{short} mask={None if self.mask is None else self.mask.ravel().tolist()}"
        )
