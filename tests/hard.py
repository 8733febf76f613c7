"""Inputs that break formulas for mean and variance, and errors of norms on them in units of eps.

A unit is eps (1 + |mean| / s) with s = sqrt(var + epsilon), the error from rounding the mean alone.
Rows of x are entries and columns are features, whatever the norm: each norm reduces the rows.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import normjax
from tests import reference
from tests.reference import EPS

FEATURES = 4


def distributions(n: int, c: int) -> Iterator[tuple[str, np.ndarray]]:
    """Inputs that break one-pass formulas, badly chosen pivots, or the range of float32."""
    rng = np.random.default_rng(3)
    normal = rng.normal(size=(n, c))
    for m in (0, *(10.0**k for k in range(1, 7))):
        yield f"N({m:g}, 1)", m + normal
        yield f"comb of zeros, N({m:g}, 1)", np.where(np.arange(n)[:, None] % 8, m + normal, 0)
    for name, row in (("first", 0), ("last", -1)):
        outlier = normal.copy()
        outlier[row] = 1e7
        yield f"outlier {name}", outlier
        outlier = 1e4 + normal
        outlier[row] *= -1e3
        yield f"outlier {name}, offset", outlier
    yield "constant", np.broadcast_to(np.array([0.1, 3.0, 1e3 / 3, 1e6 / 7])[:c], (n, c))
    yield "heavy tails", rng.standard_t(1.5, (n, c))
    for size in (1e-12, 1e-6, 1e6, 1e15):
        yield f"scale {size:g}", (normal + 1) * size
    yield "one half far away", np.where(np.arange(n)[:, None] < n // 2, 1e5, -1e5) + normal


def more(n: int, c: int) -> Iterator[tuple[str, np.ndarray]]:
    """Inputs on which a pivot that is known before x, or taken from a part of x, may fail."""
    rng = np.random.default_rng(5)
    dead = np.where(np.arange(c) % 2, rng.normal(size=(n, c)), 0)
    yield "dead channels", dead
    yield "dead channels, offset", np.where(np.arange(c) % 2, 1e4 + dead, 0)
    # Every power of two up to 64 divides the distance between two outliers.
    for step in (2, 8, 64):
        far = np.arange(n)[:, None] % step == step // 2
        yield f"comb of outliers, 1 of {step}", np.where(far, 1e6, 0) + rng.normal(size=(n, c))
    yield "a ramp", np.linspace(-1e3, 1e3, n)[:, None] + rng.normal(size=(n, c))


@cache
def inputs(n: int, c: int = FEATURES) -> dict[str, np.ndarray]:
    """x in float32 by name."""
    return {name: x.astype(np.float32) for name, x in (*distributions(n, c), *more(n, c))}


def epsilon_of(name: str) -> float:
    """1e-5, or 0 where that exceeds the variance of the data."""
    return 0.0 if name == "scale 1e-12" else 1e-5


# The running mean as a function of the mean of the batch and s.
PIVOTS: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda mean, s: None,
    "the mean": lambda mean, s: mean,
    "s / 2 off": lambda mean, s: mean + s / 2,
    "1.41 s off": lambda mean, s: mean + 1.41 * s,
    "3 s off": lambda mean, s: mean - 3 * s,
    "1e4 s off": lambda mean, s: mean + 1e4 * s,
    "zero": lambda mean, s: 0 * mean,
    "1e18": lambda mean, s: 0 * mean + 1e18,
    "3e38": lambda mean, s: 0 * mean + 3e38,
    "infinity": lambda mean, s: 0 * mean + np.inf,
    "NaN": lambda mean, s: 0 * mean + np.nan,
}


# Pivots for which one pass is enough, just enough, or not enough (far, overflow).
KINDS = {
    "near": ("the mean", "s / 2 off"),
    "edge": ("1.41 s off",),
    "far": ("none", "3 s off", "zero", "3e38", "infinity", "NaN"),
    "overflow": ("1e4 s off", "1e18"),
}


class Normed(NamedTuple):
    """y, the variance if the norm returns it, and the gradient of x."""

    y: Any
    var: Any
    dx: Any


def batch(x: Any, pivot: Any, mask: Any, epsilon: Any) -> tuple[Any, Any]:
    """Batch norm with the running mean `pivot`, or without running statistics if it is None."""
    # Features without a valid entry keep this variance, which is 0 in the oracle.
    stats = None if pivot is None else normjax.BatchStats(pivot, jnp.zeros_like(pivot.real))
    options = dict(train=True, momentum=0.0, epsilon=epsilon, mask=mask)
    y, stats = normjax.batch_norm(x, stats, **options)
    return y, None if stats is None else stats.var


def layer(x: Any, pivot: Any, mask: Any, epsilon: Any) -> tuple[Any, Any]:
    x, mask = x.T, None if mask is None else mask.T
    y = normjax.layer_norm(x, epsilon=epsilon, mask=mask)
    return y.T, normjax.measure(x, -1, mask).variance()


def rms(x: Any, pivot: Any, mask: Any, epsilon: Any) -> tuple[Any, Any]:
    x, mask = x.T, None if mask is None else mask.T
    moments = normjax.measure(x, -1, mask, centered=False)
    return normjax.rms_norm(x, epsilon=epsilon, mask=mask).T, moments.variance()


def instance(x: Any, pivot: Any, mask: Any, epsilon: Any) -> tuple[Any, Any]:
    x, mask = x[None], None if mask is None else mask[None]
    y = normjax.instance_norm(x, epsilon=epsilon, mask=mask)
    return y[0], normjax.measure(x, 1, mask).variance()[0]


def group(x: Any, pivot: Any, mask: Any, epsilon: Any) -> tuple[Any, Any]:
    mask = None if mask is None else mask[None]
    how = dict(num_groups=FEATURES // 2, epsilon=epsilon, mask=mask)
    return normjax.group_norm(x[None], **how)[0], None


NORMS = {f.__name__: f for f in (batch, layer, rms, instance, group)}
CASES = [*(f"batch, {kind}" for kind in KINDS), *(name for name in NORMS if name != "batch")]


@partial(jax.jit, static_argnames="norm")
def run(x: Any, dy: Any, pivot: Any, mask: Any, *, norm: str, epsilon: Any) -> Normed:
    y, pullback, var = jax.vjp(lambda x: NORMS[norm](x, pivot, mask, epsilon), x, has_aux=True)
    return Normed(y, var, pullback(dy)[0])


def oracle(x: Any, dy: Any, mask: Any, *, norm: str, epsilon: float) -> reference.Normed:
    """In float64; statistics of a group are those of each of its features."""
    how = dict(epsilon=epsilon, centered=norm != "rms")
    if norm != "group":
        return reference.standardized(x, 1.0, 0.0, dy, axes=(0,), mask=mask, **how)
    split, full = (len(x), FEATURES // 2, 2), (len(x), FEATURES)
    if mask is not None:
        mask = np.broadcast_to(mask, full).reshape(split)
    x, dy = (np.asarray(v).reshape(split) for v in (x, dy))
    want = reference.standardized(x, 1.0, 0.0, dy, axes=(0, 2), mask=mask, **how)
    mean, var, count = (np.repeat(v, 2, 2).reshape(1, FEATURES) for v in want[1:4])
    return want._replace(
        y=want.y.reshape(full), mean=mean, var=var, count=count, dx=want.dx.reshape(full)
    )


def units(got: Normed, want: reference.Normed, dy: Any, epsilon: float) -> Normed:
    """The largest errors of y, of the variance and of dx; infinite where one is not finite."""
    got = Normed(*(v if v is None else np.asarray(v, np.float64) for v in got))
    s = np.sqrt(want.var + epsilon)
    unit = EPS["float32"] * reference.condition(want.mean, want.var, epsilon)
    size = np.maximum(np.abs(want.dx).max(0), np.abs(dy).max(0) / s)
    var = 0.0 if got.var is None else np.abs(got.var - want.var) / (unit * s**2)
    errors = (
        np.abs(got.y - want.y) / (unit * np.maximum(1, np.abs(want.y))),
        var,
        np.abs(got.dx - want.dx) / (unit * size),
    )
    return Normed(*(float(np.nan_to_num(np.max(e), nan=np.inf)) for e in errors))


@cache
def cotangent(n: int) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(n, FEATURES)).astype(np.float32)


@cache
def _wanted(name: str, n: int, norm: str) -> reference.Normed:
    return oracle(inputs(n)[name], cotangent(n), None, norm=norm, epsilon=epsilon_of(name))


def errors(
    norm: str, name: str, n: int, pivots: tuple[str, ...] = ("none",)
) -> Iterator[tuple[str, Normed]]:
    """(pivot, errors in units) of a norm on an input, for each of PIVOTS that is named."""
    x, dy, epsilon = inputs(n)[name], cotangent(n), epsilon_of(name)
    # The oracle is the same for the other norms.
    want = _wanted(name, n, norm if norm in ("rms", "group") else "batch")
    mean, s = want.mean[0], np.sqrt(want.var[0] + epsilon)
    for pivot in pivots:
        center = PIVOTS[pivot](mean, s)
        center = None if center is None else np.float32(center)
        got = run(x, dy, center, None, norm=norm, epsilon=epsilon)
        yield pivot, units(got, want, dy, epsilon)


def errors_of_case(
    case: str, n: int, names: tuple[str, ...] | None = None
) -> Iterator[tuple[str, Normed]]:
    """(input and pivot, errors in units) of one of CASES on all inputs or on those named."""
    norm, _, kind = case.partition(", ")
    for name in names or inputs(n):
        for pivot, units in errors(norm, name, n, KINDS.get(kind, ("none",))):
            yield (f"{name}, pivot {pivot}" if kind else name), units
