"""Random inputs, hard ones among them: value and every derivative against NumPy float64.

The value, the JVP, the VJP and the Hessian-vector product (forward over reverse) of every norm
function, for constant features, large offsets, ties, one valid entry, NaN under the mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from tests import hyperdual
from tests.hyperdual import HyperDual, where
from tests.reference import EPS
from tests.strategies import DTYPES, axes, canonical, examples, few, how_to_run, runs

SHAPES = [(2, 3, 4), (6, 4), (2, 2, 3, 4)]
# How often the formula is evaluated with operations that are off by eps, and what multiple of the
# largest change of the result an error may be. Of six changes hardly ever all are small.
PERTURBED, FACTOR = 6, 16


@dataclass(frozen=True)
class Case:
    """`ours(*inputs)` is a tuple of arrays, `exact` the same for hyper-dual numbers.

    An input of the oracle has the rank of x, its shape is in `shapes`.
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
    """None, or a mask of any broadcast shape; and x with anything where it is False."""
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
    """A scale or bias: of the size of one, tiny, far, with a zero; or none."""
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


def windows(features, size):
    """The features that local response norm sums for each feature, as in PyTorch."""
    i = np.arange(features)
    reach = i[:, None] - i[None, :]
    return ((-(size // 2) <= reach) & (reach <= (size - 1) // 2)).astype(float)


def blocks(features, groups):
    return np.kron(np.eye(groups), np.ones((features // groups, features // groups)))


def leaky_relu(slope):
    return normjax.LeakyReLU(slope), lambda y: where(above(y, 0.0), y, slope * y)


def elu(alpha):
    def exact(y):
        up = above(y, 0.0)
        return where(up, y, alpha * where(up, 0.0, y).expm1())

    return normjax.ELU(alpha), exact


def above(y, threshold):
    """y >= threshold; an example in which a rounding decides that says nothing."""
    side = (y - threshold).value
    change = abs(side - side[:1]).max(0) + 8 * EPS["float32"] * abs(y.value[0])
    hypothesis.assume(np.all(abs(side[0]) >= FACTOR * change))
    return np.broadcast_to(side[:1] >= 0, side.shape)


NORMS = {}


def norm(name):
    def registered(function):
        NORMS[name] = function
        return function

    return registered


class Draw:
    """One example being drawn: what `ours` and `exact` of a norm are made of."""

    def __init__(self, draw, name):
        self.draw, self.name, self.options = draw, name, {}
        self.seed = draw(st.integers(0, 2**32 - 1))
        self.rng = np.random.default_rng(self.seed)
        self.dtype = draw(st.sampled_from(["float64", "float32", *DTYPES]))
        self.inputs, self.shapes = [], []
        self.mask = self.within = None

    def pick(self, *values):
        return self.draw(st.sampled_from(values))

    def shape(self, smallest=2):
        return self.pick(*few([s for s in SHAPES if len(s) >= smallest]))

    def x(self, shape, reduced, masked=True):
        self.kind, x = hard(self.draw, self.rng, shape, reduced, self.dtype)
        self.within = tuple(reduced)
        self.masked = "none"
        if masked:
            self.masked, self.mask, x = a_mask(self.draw, self.rng, x, reduced)
        self.add(x, x.shape)
        return x

    def add(self, v, shape):
        """An input, and its shape in the rank of x; x has the dtype of the case."""
        narrow = self.dtype if not self.inputs or self.rng.random() < 0.3 else "float32"
        self.inputs.append(rounded(v, "float64" if self.dtype == "float64" else narrow))
        self.shapes.append(tuple(shape))

    def affine(self, x, kept, names=("scale", "bias"), per_example=True):
        """Which of the vectors there are; each of the kept axes, or with that of the examples."""
        there = []
        for name in names:
            axes_of = kept
            if per_example and 0 not in kept and self.rng.random() < 0.2:
                axes_of = (0, *kept)
            v = vector(self.draw, self.rng, name, tuple(x.shape[a] for a in axes_of))
            if v is not None:
                self.add(v, [n if a in axes_of else 1 for a, n in enumerate(x.shape)])
                there.append(name)
        return there

    def eps(self, *more):
        self.options["epsilon"] = self.pick(1e-5, 1e-3, 0.1, *more)
        return self.options["epsilon"]

    def case(self, ours, exact):
        directions = tuple(rounded(self.rng.normal(size=v.shape), v.dtype) for v in self.inputs)
        options = {**self.options, "x": self.kind, "mask": self.masked}
        how = self.draw(how_to_run)
        return Case(
            self.name, options, ours, exact, tuple(self.inputs), directions, tuple(self.shapes),
            self.within, self.mask, self.seed, how,
        )  # fmt: skip


def negative(axes, rank):
    return tuple(a - rank for a in axes)


def batch_axes(d, smallest=2):
    """A shape, its feature axes as drawn, and the rest."""
    shape = d.shape(smallest)
    rank = len(shape)
    feature = d.draw(axes(rank, lambda kept: len(kept) < rank))
    kept = canonical(feature, rank)
    d.options["feature_axis"] = feature
    return shape, kept, tuple(a for a in range(rank) if a not in kept)


def running(d, shape):
    """Running statistics, apart from what is differentiated."""
    mean, var = d.rng.normal(0, 1, shape), d.rng.random(shape) * 3 + 0.1
    dtype = "float64" if d.dtype == "float64" else "float32"
    return rounded(mean, dtype), rounded(var, dtype)


def full(mask):
    """The mask beside the leading axes of the oracle."""
    return None if mask is None else mask[None, None]


def batch_norm(d, train, act=None):
    shape, kept, reduced = batch_axes(d)
    x = d.x(shape, reduced)
    names, epsilon = d.affine(x, kept), d.eps()
    mean, var = running(d, [shape[a] for a in kept])
    options = dict(
        train=train, feature_axis=d.options["feature_axis"], mask=d.mask, epsilon=epsilon
    )
    function, activated = normjax.batch_norm, lambda y: y
    if act:
        function = normjax.batch_norm_act
        options["activation"], activated = act
        d.options["activation"] = act[0]

    def ours(x, *vectors):
        stats = normjax.BatchStats(jnp.asarray(mean), jnp.asarray(var))
        return (function(x, stats, **dict(zip(names, vectors, strict=True)), **options)[0],)

    def exact(x, *vectors):
        vectors = dict(zip(names, vectors, strict=True))
        if train:
            how = dict(axes=negative(reduced, x.value.ndim - 2), mask=full(d.mask))
            y, *_ = hyperdual.standardized(x, **vectors, epsilon=epsilon, **how)
        else:
            m, v = (np.expand_dims(u.astype(float), reduced) for u in (mean, var))
            given = np.isfinite(x.value) | (True if d.mask is None else full(d.mask))
            y = (where(given, x, 0.0) - m) * (v + epsilon) ** -0.5 * vectors.get("scale", 1.0)
            y = y + vectors.get("bias", 0.0)
        return (activated(y),)

    return d.case(ours, exact)


NORMS["batch_norm, train"] = partial(batch_norm, train=True)
NORMS["batch_norm, eval"] = partial(batch_norm, train=False)


@norm("batch_norm_act")
def batch_norm_act(d):
    act = d.pick(leaky_relu, elu)(d.pick(0.01, 0.3, 1.0))
    return batch_norm(d, d.pick(True, True, False), act)


@norm("batch_renorm")
def batch_renorm(d):
    shape, kept, reduced = batch_axes(d)
    x = d.x(shape, reduced)
    names, epsilon = d.affine(x, kept), d.eps()
    mean, var = running(d, [shape[a] for a in kept])
    r_max, d_max = d.pick((1.0, 0.0), (3.0, 5.0), (1.2, 0.3), (1e3, 1e3))
    d.options.update(r_max=r_max, d_max=d_max)
    options = dict(feature_axis=d.options["feature_axis"], mask=d.mask, epsilon=epsilon)

    def ours(x, *vectors):
        stats = normjax.BatchStats(jnp.asarray(mean), jnp.asarray(var))
        vectors = dict(zip(names, vectors, strict=True))
        bounds = dict(r_max=r_max, d_max=d_max)
        return (normjax.batch_renorm(x, stats, **vectors, train=True, **bounds, **options)[0],)

    def exact(x, *vectors):
        vectors = dict(zip(names, vectors, strict=True))
        how = dict(axes=negative(reduced, x.value.ndim - 2), mask=full(d.mask), epsilon=epsilon)
        y, m, v = hyperdual.standardized(x, **how)
        old_m, old_v = (np.expand_dims(u.astype(float), reduced) for u in (mean, var))
        batch, old = np.sqrt(v.value + epsilon), np.sqrt(old_v + epsilon)
        r = np.clip(batch / old, 1 / r_max, r_max)
        shift = np.clip((m.value - old_m) / old, -d_max, d_max)
        return ((y * r + shift) * vectors.get("scale", 1.0) + vectors.get("bias", 0.0),)

    return d.case(ours, exact)


def within(d, function, reduced, kept, shape, names=("scale", "bias"), more=(), **exact_options):
    """The norms without a state: one function, and the formula over the reduced axes."""
    x = d.x(shape, reduced)
    names, epsilon = d.affine(x, kept, names), d.eps()
    options = {k: v for k, v in d.options.items() if k not in more}

    def ours(x, *vectors):
        return (function(x, **dict(zip(names, vectors, strict=True)), mask=d.mask, **options),)

    def exact(x, *vectors):
        vectors = dict(zip(names, vectors, strict=True))
        floor = vectors.pop("threshold", None)
        how = dict(axes=negative(exact_options.get("axes", reduced), len(shape)), epsilon=epsilon)
        rest = {k: v for k, v in exact_options.items() if k != "axes"}
        y, *_ = hyperdual.standardized(x, **vectors, mask=full(d.mask), **how, **rest)
        return (y if floor is None else where(above(y - floor, 0.0), y, floor),)

    return d.case(ours, exact)


@norm("layer_norm")
def layer_norm(d, function=normjax.layer_norm, **options):
    shape = d.shape()
    axis = d.options["axis"] = d.draw(axes(len(shape)))
    reduced = canonical(axis, len(shape))
    return within(d, function, reduced, reduced, shape, **options)


@norm("rms_norm")
def rms_norm(d):
    return layer_norm(d, normjax.rms_norm, names=("scale",), centered=False)


@norm("group_norm")
def group_norm(d):
    shape = d.shape()
    rank, features = len(shape), shape[-1]
    groups = d.options["num_groups"] = d.pick(1, 2, 4)
    reduced = tuple(range(1, rank))
    pool = blocks(features, groups)
    spatial = reduced[:-1]
    return within(d, normjax.group_norm, reduced, (rank - 1,), shape, axes=spatial, pool=pool)


@norm("instance_norm")
def instance_norm(d, function=normjax.instance_norm, **options):
    shape = d.shape(3)
    rank = len(shape)
    feature = d.draw(axes(rank, lambda kept: 0 not in kept and len(kept) < rank - 1))
    d.options["feature_axis"] = feature
    kept = canonical(feature, rank)
    reduced = tuple(a for a in range(1, rank) if a not in kept)
    return within(d, function, reduced, kept, shape, **options)


@norm("filter_response_norm")
def filter_response_norm(d):
    names = ("scale", "bias", "threshold")
    return instance_norm(d, normjax.filter_response_norm, names=names, centered=False)


def weight(d, function, name, **options):
    shape = d.shape()
    rank = len(shape)
    feature = d.options["feature_axis"] = d.draw(axes(rank, lambda kept: len(kept) < rank))
    kept = canonical(feature, rank)
    reduced = tuple(a for a in range(rank) if a not in kept)
    w = d.x(shape, reduced, masked=False)
    names, epsilon = d.affine(w, kept, (name,), per_example=False), d.eps(1e-12)
    chosen = dict(d.options)

    def ours(w, *vectors):
        return (function(w, **dict(zip(names, vectors, strict=True)), **chosen),)

    def exact(w, scale=1.0):
        how = dict(axes=negative(reduced, rank), epsilon=epsilon, **options)
        return (hyperdual.standardized(w, scale, **how)[0],)

    return d.case(ours, exact)


@norm("weight_norm")
def weight_norm(d):
    return weight(d, normjax.weight_norm, "scale", centered=False, times="n")


@norm("standardize_weight")
def standardize_weight(d):
    d.options["scaled"] = d.pick(False, True)
    times = "n" if d.options["scaled"] else 1
    return weight(d, normjax.standardize_weight, "gain", times=times)


@norm("l2_normalize")
def l2_normalize(d):
    shape = d.shape()
    axis = d.options["axis"] = d.draw(axes(len(shape)))
    reduced = canonical(axis, len(shape))
    d.x(shape, reduced, masked=False)
    epsilon = d.eps(1e-12)

    def ours(x):
        return (normjax.l2_normalize(x, axis=axis, epsilon=epsilon),)

    def exact(x):
        return (x * ((x * x).sum(negative(reduced, len(shape))) + epsilon) ** -0.5,)

    return d.case(ours, exact)


@norm("local_response_norm")
def local_response_norm(d):
    shape = d.shape()
    d.x(shape, (len(shape) - 1,), masked=False)
    o = d.options
    o.update(size=d.pick(1, 2, 3, 5), alpha=d.pick(1e-4, 0.5), beta=d.pick(0.5, 0.75, 2.0))
    o["k"] = d.pick(1.0, 2.0, 0.01)

    def ours(x):
        return (normjax.local_response_norm(x, **o),)

    def exact(x):
        mean = (x * x) @ windows(shape[-1], o["size"]) * (1 / o["size"])
        return (x * (o["k"] + o["alpha"] * mean) ** -o["beta"],)

    return d.case(ours, exact)


@norm("dynamic_tanh")
def dynamic_tanh(d):
    shape = d.shape()
    rank = len(shape)
    feature = d.options["feature_axis"] = d.draw(axes(rank, lambda kept: len(kept) < rank))
    x = d.x(shape, (), masked=False)
    d.add(d.rng.normal(), (1,) * rank)
    names = d.affine(x, canonical(feature, rank))

    def ours(x, alpha, *vectors):
        vectors = dict(zip(names, vectors, strict=True))
        return (normjax.dynamic_tanh(x, alpha, **vectors, feature_axis=feature),)

    def exact(x, alpha, *vectors):
        vectors = dict(zip(names, vectors, strict=True))
        y = (alpha * x).tanh()
        return (y * vectors.get("scale", 1.0) + vectors.get("bias", 0.0),)

    return d.case(ours, exact)


@norm("add_layer_norm")
def add_layer_norm(d):
    centered = d.pick(True, False)
    function = normjax.add_layer_norm if centered else normjax.add_rms_norm
    shape = d.shape()
    rank = len(shape)
    axis = d.options["axis"] = d.draw(axes(rank))
    reduced = canonical(axis, rank)
    x = d.x(shape, reduced)
    # The sum is exact in any dtype, and so are sums of directions.
    residual = x * x.dtype.type(d.pick(1.0, -0.5, 0.0))
    d.add(residual, shape)
    d.inputs[1] = residual
    names = d.affine(x, reduced, ("scale", "bias") if centered else ("scale",))
    options = dict(axis=axis, epsilon=d.eps(), mask=d.mask)

    def ours(x, residual, *vectors):
        return function(x, residual, **dict(zip(names, vectors, strict=True)), **options)

    def exact(x, residual, *vectors):
        how = dict(axes=negative(reduced, rank), epsilon=options["epsilon"], mask=full(d.mask))
        vectors = dict(zip(names, vectors, strict=True))
        total = x + residual
        return hyperdual.standardized(total, **vectors, **how, centered=centered)[0], total

    case = d.case(ours, exact)
    along = case.directions[0]
    return replace(case, directions=(along, along * along.dtype.type(-0.5), *case.directions[2:]))


@st.composite
def cases(draw, name):
    """An example of the norm of this name."""
    return NORMS[name](Draw(draw, name))


def derivatives(case, cotangents):
    """Outputs, their JVP, the VJP of all inputs, and how that changes along the directions."""
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
    """The same in float64 in the first row; in the others with every operation off by eps."""
    eps = EPS["float64" if case.inputs[0].dtype == np.float64 else "float32"]

    def rounding(v):
        if v.ndim == 0:
            return v
        off = rng.uniform(-eps, eps, (PERTURBED + 1, *v.shape[1:]))
        off[0] = 0
        return v + v * off

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

    def owed(part):
        """Of the derivatives along every input, what the cotangents ask of them."""
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

    return along(0), along(2), owed(1), owed(3)


def check(case):
    """Compares everything, each within the error that rounding explains."""
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
            close(f"{kind} {i}", case, a, rows, EPS[inner])


def close(what, case, got, rows, eps):
    """An error is `FACTOR` times what operations off by eps change, and a rounding of the result.

    Of a group that shares statistics the largest change counts for all of its entries.
    """
    own = EPS[str(got.dtype)]
    want = rows[0]
    change = abs(rows[1:] - want).max(0)
    size = abs(np.where(np.isfinite(want), want, 0))
    if want.shape == case.shapes[0]:
        change = np.maximum(change, change.max(case.within, keepdims=True, initial=0))
        size = size.max(case.within, keepdims=True, initial=0)
    info = jnp.finfo(got.dtype)
    bound = FACTOR * change + 4 * own * abs(want) + FACTOR * eps * size
    bound = bound + 2 * float(info.smallest_normal)
    got = got.reshape(want.shape).astype(np.float64)
    beyond = abs(want) > 0.5 * float(info.max)
    same = (abs(got - want) <= bound) | (np.isnan(got) & np.isnan(want)) | beyond | (got == want)
    worst = np.nanmax(np.where(same, 0, abs(got - want) / np.maximum(bound, 1e-300)), initial=0)
    assert same.all(), (
        f"{what} of dtype {info.dtype}: {worst:.3g} times the bound at "
        f"{np.argwhere(~same)[:4].tolist()}: {got[~same][:4]} for {want[~same][:4]}"
    )


@pytest.mark.parametrize("name", NORMS)
def test_every_derivative_is_that_of_the_formula(name):
    @examples(3, tests=len(NORMS))
    @hypothesis.given(cases(name))
    def compare(case):
        check(case)

    compare()
