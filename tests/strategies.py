"""What the random comparisons share: how many examples, how they run, axes in any spelling."""

import contextlib
import os

import hypothesis
import hypothesis.strategies as st
import jax

DTYPES = ("float32", "bfloat16", "float16")


MANY = int(os.environ.get("NORMJAX_EXAMPLES", "0"))


def examples(some, tests):
    """`some` fixed examples; or NORMJAX_EXAMPLES new ones in all, of which this is one of `tests`.

    The checks of slow and of large examples are off: the first example of each shape compiles.
    """
    return hypothesis.settings(
        max_examples=-(-MANY // tests) or some,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# One operation at a time runs the same derivative rules as a compiled program, and operations of
# one shape are compiled once for all examples: 20 times as many examples in the same time. What
# is fused or lowered otherwise in a program is tried now and then, in long runs.
how_to_run = st.sampled_from(["eager"] * 15 + ["jit"] * bool(MANY))


def runs(how):
    """The context and the transformation in which an example runs."""
    if how == "jit":
        return contextlib.nullcontext(), jax.jit
    return jax.disable_jit(), lambda f: f


# Which axes stand together, for each rank. Few: every new selection compiles anew.
SELECTIONS = {
    2: [(1,), (0,), (0, 1)],
    3: [(2,), (1, 2), (1,), (0, 2)],
    4: [(3,), (1, 3), (1, 2, 3)],
    5: [(4,), (1, 3, 4), (0, 1, 4)],
}


def few(choices):
    """All choices; the first in the fixed run of a few examples, since each compiles anew."""
    return choices if MANY else choices[:1]


@st.composite
def axes(draw, rank, allowed=lambda chosen: True):
    """Distinct axes in any order, counted from either end; one alone may stand without a tuple."""
    chosen = draw(st.sampled_from(few([c for c in SELECTIONS[rank] if allowed(c)])))
    chosen = draw(st.permutations(chosen))
    spelled = tuple(a - rank if draw(st.booleans()) else a for a in chosen)
    return spelled[0] if len(spelled) == 1 and draw(st.booleans()) else spelled


def canonical(axes, rank):
    """Axes as sorted non-negative integers."""
    axes = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted(a % rank for a in axes))
