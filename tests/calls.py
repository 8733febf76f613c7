"""Random calls of every norm function with its formula, for tests/test_random_derivatives.py.

They include inputs that are numerically difficult: constant features, large offsets, ties, one
valid entry, NaN under the mask, scales far below the bias.
"""

from dataclasses import replace
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

import normjax
from tests import hyperdual
from tests.hyperdual import where
from tests.reference import EPS
from tests.strategies import (
    DTYPES,
    Call,
    a_mask,
    axes,
    canonical,
    few,
    hard,
    how_to_run,
    rounded,
    vector,
)

SHAPES = [(2, 3, 4), (6, 4), (2, 2, 3, 4)]
HALF = ("bfloat16", "float16")
# Largest allowed error, as a multiple of the change of the result by rounding errors of eps.
FACTOR = 16


def leaky_relu(slope):
    return normjax.LeakyReLU(slope), lambda y: where(above(y, 0.0, tie=True), y, slope * y)


def elu(alpha):
    def exact(y):
        up = above(y, 0.0, tie=False)
        return where(up, y, alpha * where(up, 0.0, y).expm1())

    return normjax.ELU(alpha), exact


def above(y, threshold, tie=None):
    """Where y > threshold, or >= if `tie`; rejects examples in which rounding decides."""
    side = (y - threshold).value
    change = abs(side - side[:1]).max(0) + 8 * EPS["float32"] * abs(y.value[0])
    clear = abs(side[0]) > FACTOR * change
    if tie is not None:
        clear |= (side == 0).all(0)
    hypothesis.assume(clear.all())
    return np.broadcast_to(side[:1] >= 0 if tie else side[:1] > 0, side.shape)


NORMS = {}


def norm(name):
    return lambda function: NORMS.setdefault(name, function)


class Draw:
    """Draws the inputs and the options of one example."""

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
        """Adds an input and its shape in the rank of x; x itself has the dtype of the case."""
        dtype = self.dtype if not self.inputs or self.rng.random() < 0.3 else "float32"
        self.inputs.append(rounded(v, "float64" if self.dtype == "float64" else dtype))
        self.shapes.append(tuple(shape))

    def affine(self, x, kept, names=("scale", "bias"), per_example=True):
        """Adds some vectors, with values for the kept axes or also each example; returns names."""
        present = []
        for name in names:
            axes_of = kept
            if per_example and 0 not in kept and self.rng.random() < 0.2:
                axes_of = (0, *kept)
            v = vector(self.draw, self.rng, name, tuple(x.shape[a] for a in axes_of))
            if v is not None:
                self.add(v, [n if a in axes_of else 1 for a, n in enumerate(x.shape)])
                present.append(name)
        return present

    def eps(self, *more):
        self.options["epsilon"] = self.pick(1e-5, 1e-3, 0.1, *more)
        return self.options["epsilon"]

    def case(self, ours, exact):
        directions = tuple(rounded(self.rng.normal(size=v.shape), v.dtype) for v in self.inputs)
        options = {**self.options, "x": self.kind, "mask": self.masked}
        how = self.draw(how_to_run)
        return Call(
            self.name, options, ours, exact, tuple(self.inputs), directions, tuple(self.shapes),
            self.within, self.mask, self.seed, how,
        )  # fmt: skip


def negative(axes, rank):
    return tuple(a - rank for a in axes)


def batch_axes(d):
    """A shape, its feature axes and the other axes."""
    shape = d.shape()
    rank = len(shape)
    feature = d.draw(axes(rank, lambda kept: len(kept) < rank))
    kept = canonical(feature, rank)
    d.options["feature_axis"] = feature
    return shape, kept, tuple(a for a in range(rank) if a not in kept)


def running(d, shape):
    """Running statistics, which are not differentiated."""
    mean, var = d.rng.normal(0, 1, shape), d.rng.random(shape) * 3 + 0.1
    dtype = "float64" if d.dtype == "float64" else "float32"
    return rounded(mean, dtype), rounded(var, dtype)


def full(mask):
    """The mask with the two leading axes of the oracle."""
    return None if mask is None else mask[None, None]


def batch_norm(d, train, act=None):
    shape, kept, reduced = batch_axes(d)
    x = d.x(shape, reduced)
    names, epsilon = d.affine(x, kept), d.eps()
    mean, var = running(d, [shape[a] for a in kept])
    options = dict(
        train=train, feature_axis=d.options["feature_axis"], mask=d.mask, epsilon=epsilon
    )
    function, activated = normjax.batch_norm, None
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
        if activated and d.dtype in HALF:
            # Between norm and activation the derivatives are rounded to the dtype of x.
            y = y.narrowed(EPS[d.dtype] / EPS["float32"])
        return (activated(y) if activated else y,)

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


def stateless(d, function, reduced, kept, shape, names=("scale", "bias"), **formula):
    """A norm without running statistics, and its formula over the reduced axes."""
    x = d.x(shape, reduced)
    names, epsilon = d.affine(x, kept, names), d.eps()
    options = dict(d.options)

    def ours(x, *vectors):
        return (function(x, **dict(zip(names, vectors, strict=True)), mask=d.mask, **options),)

    def exact(x, *vectors):
        vectors = dict(zip(names, vectors, strict=True))
        floor = vectors.pop("threshold", None)
        how = {"axes": reduced, "epsilon": epsilon, **vectors, **formula}
        how["axes"] = negative(how["axes"], len(shape))
        y, *_ = hyperdual.standardized(x, mask=full(d.mask), **how)
        return (y if floor is None else where(above(y, floor), y, floor),)

    return d.case(ours, exact)


@norm("layer_norm")
def layer_norm(d, function=normjax.layer_norm, **options):
    shape = d.shape()
    axis = d.options["axis"] = d.draw(axes(len(shape)))
    reduced = canonical(axis, len(shape))
    return stateless(d, function, reduced, reduced, shape, **options)


@norm("rms_norm")
def rms_norm(d):
    return layer_norm(d, normjax.rms_norm, names=("scale",), centered=False)


@norm("group_norm")
def group_norm(d):
    shape = d.shape()
    rank, features = len(shape), shape[-1]
    groups = d.options["num_groups"] = d.pick(1, 2, 4)
    reduced = tuple(range(1, rank))
    pool = hyperdual.blocks(features, groups)
    spatial = reduced[:-1]
    return stateless(d, normjax.group_norm, reduced, (rank - 1,), shape, axes=spatial, pool=pool)


@norm("instance_norm")
def instance_norm(d, function=normjax.instance_norm, **options):
    shape = d.shape(3)
    rank = len(shape)
    feature = d.draw(axes(rank, lambda kept: 0 not in kept and len(kept) < rank - 1))
    d.options["feature_axis"] = feature
    kept = canonical(feature, rank)
    reduced = tuple(a for a in range(1, rank) if a not in kept)
    return stateless(d, function, reduced, kept, shape, **options)


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
        mean = (x * x) @ hyperdual.windows(shape[-1], o["size"]) * (1 / o["size"])
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
    with np.errstate(invalid="ignore"):
        residual = d.inputs[0] * d.inputs[0].dtype.type(d.pick(1.0, -0.5, 0.0))
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
        # The sum and its derivatives have the dtype of x.
        normed = total.narrowed(EPS[d.dtype] / EPS["float32"]) if d.dtype in HALF else total
        return hyperdual.standardized(normed, **vectors, **how, centered=centered)[0], total

    case = d.case(ours, exact)
    along = case.directions[0]
    return replace(case, directions=(along, along * along.dtype.type(-0.5), *case.directions[2:]))


@st.composite
def cases(draw, name):
    """An example of the norm of this name."""
    return NORMS[name](Draw(draw, name))
