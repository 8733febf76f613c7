"""Random calls, some ill-conditioned: value and every derivative against NumPy float64.

Compares the value, the JVP, the VJP and the Hessian-vector product (forward over reverse) of every
norm function. tests/calls.py draws the calls, tests/hyperdual.py differentiates the formulas.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.calls import FACTOR, NORMS, cases
from tests.hyperdual import HyperDual
from tests.reference import EPS
from tests.strategies import examples, rounded, runs

# How often the formula is evaluated with operations that are off by up to eps. The changes of the
# result are rarely small in all six evaluations.
PERTURBED = 6


def derivatives(case, cotangents):
    """Outputs, their JVP, the VJP of all inputs, and the derivative of the VJP along directions."""
    inputs, directions, cotangents = jax.tree.map(
        jnp.asarray, (case.inputs, case.directions, cotangents)
    )

    def gradients(*inputs):
        return jax.vjp(case.ours, *inputs)[1](cotangents)

    def every(inputs, directions):
        pushed = jax.jvp(case.ours, inputs, directions)
        return (*pushed, *jax.jvp(gradients, inputs, directions))

    context, transformed = runs(case.how)
    with context:
        return transformed(every)(inputs, directions)


def exact_derivatives(case, cotangents, rng):
    """The same in float64. Except in the first row, every operation is off by up to eps."""
    eps = EPS["float64" if case.inputs[0].dtype == np.float64 else "float32"]

    def rounding(v):
        if v.ndim == 0:
            return v
        off = rng.uniform(-eps, eps, (PERTURBED + 1, *v.shape[1:]))
        off[0] = 0
        return v * (1 + off)

    def number(v, direction, shape, one):
        v, direction = (np.reshape(u, (1, 1, *shape)) for u in (v, direction))
        one = one.reshape(1, total, *shape)
        return HyperDual(v, one, direction, np.zeros_like(v, float), rounding)

    sizes = [int(np.prod(shape)) for shape in case.shapes]
    ends, total = np.cumsum(sizes), sum(sizes)
    every = np.split(np.eye(total), ends[:-1], axis=1)
    numbers = map(number, case.inputs, case.directions, case.shapes, every)
    outputs = case.exact(*numbers)
    rank = len(case.shapes[0])
    outputs = [y.spread(case.shapes[0]) for y in outputs]
    weights = [w.astype(float) for w in cotangents]

    def pulled_back(part):
        """The derivatives by every input, multiplied by the cotangents and summed."""
        across = tuple(range(-rank, 0))
        sums = sum(
            rounding(w * y.parts[part]).sum(across) for w, y in zip(weights, outputs, strict=True)
        )
        sums = np.broadcast_to(sums, (PERTURBED + 1, total))
        parts = np.split(sums, ends[:-1], axis=1)
        return [g.reshape(-1, *shape) for g, shape in zip(parts, case.shapes, strict=True)]

    def along(part):
        return [
            np.broadcast_to(y.parts[part], (PERTURBED + 1, 1, *case.shapes[0]))[:, 0]
            for y in outputs
        ]

    return along(0), along(2), pulled_back(1), pulled_back(3)


def check(case):
    """Compares all results within the errors that rounding explains."""
    dtype = case.inputs[0].dtype
    rng = np.random.default_rng(case.seed + 1)
    cotangents = tuple(
        rounded(rng.normal(size=case.shapes[0]), dtype)
        for _ in range(2 if case.name.startswith("add") else 1)
    )
    with np.errstate(all="ignore"):
        exact = exact_derivatives(case, cotangents, rng)
    jax.config.update("jax_enable_x64", dtype == np.float64)
    try:
        got = jax.tree.map(np.asarray, derivatives(case, cotangents))
    finally:
        jax.config.update("jax_enable_x64", False)
    inner = "float64" if dtype == np.float64 else "float32"
    for kind, ours, theirs in zip(("y", "JVP", "VJP", "HVP"), got, exact, strict=True):
        for i, (a, rows) in enumerate(zip(ours, theirs, strict=True)):
            with np.errstate(invalid="ignore"):  # infinite sums of masked terms
                close(f"{kind} {i}", case, a, rows, EPS[inner])


def close(what, case, got, rows, eps):
    """Allows `FACTOR` times the change by operations off by eps, and a rounding of the result.

    The largest change in a group that shares statistics counts for all of its entries.
    """
    own = EPS[str(got.dtype)]
    want = rows[0]
    # With rounding the formula may be NaN: the root of a number below 0 that should be 0.
    change = np.nan_to_num(abs(rows[1:] - want), nan=np.inf).max(0)
    size = abs(np.where(np.isfinite(want), want, 0))
    if want.shape == case.shapes[0]:
        change = np.maximum(change, change.max(case.within, keepdims=True, initial=0))
        size = size.max(case.within, keepdims=True, initial=0)
    info = jnp.finfo(got.dtype)
    bound = FACTOR * change + 4 * own * abs(want) + FACTOR * eps * size
    bound = bound + 2 * float(info.smallest_normal)
    # Values in the dtype of x, as the cotangent between norm and activation, may be denormal.
    x = case.inputs[0]
    bound = bound + x.size * float(jnp.finfo(x.dtype).smallest_subnormal)
    got = got.reshape(want.shape).astype(np.float64)
    beyond = abs(want) > 0.5 * float(info.max)
    same = (abs(got - want) <= bound) | (np.isnan(got) & np.isnan(want)) | beyond | (got == want)
    worst = np.nanmax(np.where(same, 0, abs(got - want) / np.maximum(bound, 1e-300)), initial=0)
    assert same.all(), (
        f"{what} of dtype {info.dtype}: {worst:.3g} times the bound at "
        f"{np.argwhere(~same)[:4].tolist()}: {got[~same][:4]} for {want[~same][:4]}"
    )


@pytest.mark.parametrize("name", NORMS)
def test_every_derivative_equals_that_of_the_formula(name):
    @examples(2, tests=len(NORMS))
    @hypothesis.given(cases(name))
    def compare(case):
        check(case)

    compare()
