"""Random layers and inputs: compares the norms of flax.linen and normjax.linen.

Both have the same fields and variables, and run two training steps with gradients and an
evaluation. All statistics are well conditioned, so that rounding does not explain a difference;
tests/test_random_derivatives.py has ill-conditioned data.
"""

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from tests.reference import EPS
from tests.strategies import DTYPES, axes, canonical, examples, few, how_to_run, runs

KEY = jax.random.key(0)
SHAPES = [(3, 5, 4), (6, 4), (2, 3, 2, 4), (2, 3, 1, 2, 4)]
SAMPLE = ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
NORMS = ["BatchNorm", *SAMPLE, "WeightNorm", "SpectralNorm"]
# Flax computes WeightNorm and SpectralNorm in the dtype of the weight, ten roundings in a row.
ROUNDINGS = 16


@dataclass(frozen=True)
class Case:
    """The fields of a layer in both libraries, and its arguments."""

    name: str
    fields: dict[str, Any]
    x: np.ndarray
    mask: Any
    how: str
    # The axes of the statistics.
    reduced: tuple[int, ...]
    groups: int = 1
    weight: dict[str, Any] | None = None

    def __repr__(self):
        mask = None if self.mask is None else (self.mask.shape, self.mask.dtype, self.mask.tolist())
        return (
            f"{self.name}({self.fields}) x={self.x.shape, self.x.dtype} {mask=} {self.how} "
            f"weight={self.weight}"
        )


class Weight(nn.Module):
    """A layer that returns its parameters."""

    shape: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", lambda key: spread(self.shape, 3).astype(self.dtype))
        bias = self.param("bias", lambda key: spread(self.shape[-1:], 4).astype(self.dtype))
        return {"kernel": kernel, "bias": bias}


def spread(shape, seed):
    """Neighbors along every axis differ by at least 0.75, so that no variance is close to 0."""
    steps = sum((1 + a % 3) * i for a, i in enumerate(np.indices(shape)))
    return steps % 5 - 1.6 + np.random.default_rng(seed).random(shape) / 4


def normal(key, shape, dtype):
    return jax.random.normal(key, shape).astype(dtype)


@st.composite
def masks(draw, shape, reduced, x):
    """Masks of any broadcastable shape and several dtypes. No variance becomes close to 0."""
    if draw(st.booleans()):
        return None
    of = tuple(n if draw(st.booleans()) else 1 for n in shape)
    mask = np.random.default_rng(draw(st.integers(0, 99))).random(of) < 0.7
    valid = np.broadcast_to(mask, shape)
    with np.errstate(invalid="ignore"), contextlib.suppress(RuntimeWarning):
        count = valid.sum(reduced, keepdims=True)
        mean = (x * valid).sum(reduced, keepdims=True) / np.maximum(count, 1)
        var = (valid * (x - mean) ** 2).sum(reduced, keepdims=True) / np.maximum(count, 1)
    if (var < 0.1).any():
        mask = valid | (var < 0.1)
    if draw(st.booleans()):  # without leading axes of size 1
        whole = next((a for a, n in enumerate(mask.shape) if n != 1), len(shape) - 1)
        short = mask.reshape(mask.shape[whole:])
        # A mask that also fits the leading axes is ambiguous: an error in normjax, not in Flax.
        if any(m not in (1, n) for m, n in zip(short.shape, shape, strict=False)):
            mask = short
    return mask.astype(draw(st.sampled_from([bool, np.int32, np.float32])))


@st.composite
def cases(draw, name):
    """A layer, its input and its mask."""
    fields = dict(
        dtype=draw(st.sampled_from([None, *DTYPES])),
        param_dtype=draw(st.sampled_from(["float32", *DTYPES])),
        epsilon=draw(st.sampled_from([1e-6, 1e-5, 1e-2, 0.5])),
    )
    how = draw(how_to_run)
    if name in ("WeightNorm", "SpectralNorm"):
        return draw(weights(name, fields, how))
    shape = draw(st.sampled_from(few(SHAPES)))
    hypothesis.assume(len(shape) > 2 or name != "InstanceNorm")
    rank, groups = len(shape), 1
    every = tuple(range(rank))
    fields["use_scale"] = draw(st.booleans())
    fields["scale_init"] = normal
    if name != "RMSNorm":
        fields["use_bias"] = draw(st.booleans())
        fields["bias_init"] = normal
    if name == "BatchNorm":
        fields["momentum"] = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
        fields["axis"] = draw(axes(rank, lambda kept: len(kept) < rank))
        reduced = tuple(a for a in every if a not in canonical(fields["axis"], rank))
        # One value has no variance to train with: an error in normjax, zeros in Flax.
        hypothesis.assume(np.prod([shape[a] for a in reduced]) > 1)
    elif name in ("LayerNorm", "RMSNorm"):
        fields["reduction_axes"] = draw(axes(rank))
        fields["feature_axes"] = draw(axes(rank))
        reduced = canonical(fields["reduction_axes"], rank)
    elif name == "InstanceNorm":
        fields["feature_axes"] = draw(
            axes(rank, lambda kept: 0 not in kept and len(kept) < rank - 1)
        )
        reduced = tuple(a for a in every[1:] if a not in canonical(fields["feature_axes"], rank))
    else:
        groups = draw(st.sampled_from([1, 2, 4]))
        by_size = draw(st.booleans())
        fields["num_groups"] = None if by_size else groups
        fields["group_size"] = shape[-1] // groups if by_size else None
        reduced = every[1:]
        if draw(st.booleans()):
            reduced = canonical(draw(axes(rank, lambda chosen: rank - 1 in chosen)), rank)
            spelled = draw(
                st.permutations([a - rank if draw(st.booleans()) else a for a in reduced])
            )
            fields["reduction_axes"] = tuple(spelled)
    x = spread(shape, draw(st.integers(0, 9)))
    x = np.asarray(jnp.asarray(x, draw(st.sampled_from(DTYPES))))
    if groups > 1:
        cut, split = grouped(x, reduced, groups)
        mask = draw(masks(cut.shape, split, cut.astype(np.float64)))
        if mask is not None:
            mask = np.broadcast_to(mask, cut.shape).reshape(shape)
    else:
        mask = draw(masks(shape, reduced, x.astype(np.float64)))
    return Case(name, fields, x, mask, how, reduced, groups)


@st.composite
def weights(draw, name, fields, how):
    """A wrapper around a layer with a weight of rank 2 or 3."""
    shape = draw(st.sampled_from([(5, 4), (3, 2, 4)]))
    weight = dict(shape=shape, dtype=draw(st.sampled_from(DTYPES)))
    reduced = ()
    if name == "SpectralNorm":
        # normjax adds it to lengths of vectors whose largest entry is 1, so that a small weight is
        # normalized too. The results agree with Flax if it is negligible.
        fields["epsilon"] = 1e-12
        fields["n_steps"] = draw(st.integers(0, 3))
        fields["collection_name"] = draw(st.sampled_from(["batch_stats", "spectral"]))
    else:
        fields["use_scale"] = draw(st.booleans())
        fields["scale_init"] = normal
        names = draw(st.sampled_from([["kernel"], ["bias"], None, []]))
        fields["variable_filter"] = names
        # Axes that exist in a bias too, if it is normalized.
        of_all = st.sampled_from([None, -1, (-1,)])
        kept = draw(axes(len(shape)) | st.none() if names == ["kernel"] else of_all)
        fields["feature_axes"] = kept
        kept = () if kept is None else canonical(kept, len(shape))
        reduced = tuple(a for a in range(len(shape)) if a not in kept)
    x = np.ones((2, 3), np.float32)
    return Case(name, fields, x, None, how, reduced, weight=weight)


def grouped(x, reduced, groups):
    """x with the groups on a separate axis, and the reduced axes of that shape."""
    return x.reshape(*x.shape[:-1], groups, -1), (*reduced[:-1], x.ndim)


def build(library, case):
    fields = dict(case.fields)
    if case.weight:
        fields["layer_instance"] = Weight(**case.weight, name="layer")
    elif library is nn:
        # Flax's fast variance is a difference of large numbers; normjax is accurate in both cases.
        fields["use_fast_variance"] = False
    return getattr(library, case.name)(**fields)


def modes(case, train):
    """The arguments that set the mode."""
    if case.name == "BatchNorm":
        return dict(use_running_average=not train)
    return dict(update_stats=train) if case.name == "SpectralNorm" else {}


def called_with(case, library):
    if case.mask is None:
        return {}
    if library is nn and case.name == "GroupNorm":
        # Flax reshapes the mask as though it had all features.
        return dict(mask=np.broadcast_to(case.mask, case.x.shape))
    return dict(mask=case.mask)


def train_and_evaluate(library, case):
    """Initializes, trains two steps with gradients, and evaluates."""
    layer, given = build(library, case), called_with(case, library)
    second = case.x[::-1] * case.x.dtype.type(1.5)
    dy = spread(case.x.shape, 11).astype(np.float32)
    context, transformed = runs(case.how)

    def step(variables, x):
        def loss(params, x):
            y, updates = layer.apply(
                {**variables, "params": params}, x, **modes(case, True), **given, mutable=True
            )
            updates.pop("params", None)
            parts = jax.tree.map(lambda leaf: jnp.sum(leaf.astype(np.float32) * slope(leaf)), y)
            return sum(jax.tree.leaves(parts)), (y, updates)

        def slope(leaf):
            return dy if leaf.shape == dy.shape else spread(leaf.shape, 11).astype(np.float32)

        grads, (y, updates) = jax.grad(loss, (0, 1), has_aux=True)(variables.get("params", {}), x)
        return {"y": y, "grads": grads}, {**variables, **updates}

    def served(variables, x):
        return layer.apply(variables, x, **modes(case, False), **given)

    with context:
        start = variables = transformed(partial(layer.init, **modes(case, False)))(KEY, case.x)
        first, variables = transformed(step)(variables, case.x)
        two, variables = transformed(step)(variables, second)
        evaluated = transformed(served)(variables, case.x)
    stats = {k: v for k, v in variables.items() if k != "params"}
    return start, {"first": first, "second": two, "stats": stats, "evaluated": evaluated}


@contextlib.contextmanager
def lenient():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def bounds(case, start):
    """Bounds on the error of outputs, gradients and statistics, from the eps of all dtypes.

    A deviation has an error of eps |x|, or eps |x| / s in units of the standard deviation s. An
    output multiplies it by the scale; a gradient also by 1 / s and by a deviation.
    """
    out = {case.fields["param_dtype"], case.fields["dtype"] or "float32"}
    out.add(case.weight["dtype"] if case.weight else str(case.x.dtype))
    eps = ROUNDINGS * max(EPS[d] for d in out)
    gain = 1 + max(
        (float(abs(leaf.astype(np.float32)).max()) for leaf in jax.tree.leaves(start["params"])),
        default=0,
    ) if "params" in start else 1.0  # fmt: skip
    if case.weight:
        return eps * gain * 8, eps * gain * 64, eps * 8
    x, reduced = case.x.astype(np.float64), case.reduced
    mask = np.ones(x.shape, bool) if case.mask is None else case.mask.astype(bool)
    mask = np.broadcast_to(mask, x.shape)
    if case.groups > 1:
        (x, axes), (mask, _) = (grouped(v, reduced, case.groups) for v in (x, mask))
    else:
        axes = reduced
    count = mask.sum(axes, keepdims=True)
    mean = (x * mask).sum(axes, keepdims=True) / count
    centered = case.name != "RMSNorm"
    var = (mask * (x - centered * mean) ** 2).sum(axes, keepdims=True) / count
    steep = float((1 / np.sqrt(var + case.fields["epsilon"])).max())
    # The mean of one value is exact.
    alone = count.max() == 1 and centered
    span = 1 if alone else 1 + 1.5 * float(abs(x).max()) * steep
    return eps * gain * span, eps * gain * steep * span**2, 64 * EPS["float32"]


def close(case, got, want, bound):
    a, b = (np.asarray(v, np.float64) for v in (got, want))
    assert np.all(abs(a - b) <= bound * (1 + abs(b))), (
        f"error {abs(a - b).max():.3g}, bound {bound:.3g}: {a.ravel()[:8]} for {b.ravel()[:8]}"
    )
    assert got.shape == want.shape


def check(case):
    with lenient():
        start, flax = train_and_evaluate(nn, case)
    own_start, ours = train_and_evaluate(normjax.linen, case)
    of_y, of_grads, of_stats = bounds(case, start)
    assert jax.tree.structure(own_start) == jax.tree.structure(start)
    for a, b in zip(*map(jax.tree.leaves, (own_start, start)), strict=True):
        assert a.dtype == b.dtype, "initialized"
        # The wrappers of weights store the normalized weights in init.
        close(case, a, b, of_y if case.weight else 0)
    assert jax.tree.structure(ours) == jax.tree.structure(flax)
    for when in ("first", "second"):
        for part, bound in (("y", of_y), ("grads", of_grads)):
            for a, b in zip(
                *map(jax.tree.leaves, (ours[when][part], flax[when][part])), strict=True
            ):
                assert a.dtype == b.dtype, (when, part)
                close(case, a, b, bound)
    for a, b in zip(*map(jax.tree.leaves, (ours["stats"], flax["stats"])), strict=True):
        # Flax converts u of half precision to float32 if the weight is float32; normjax does not.
        assert a.dtype == b.dtype or case.name == "SpectralNorm"
        close(case, a, b, of_stats)
    for a, b in zip(*map(jax.tree.leaves, (ours["evaluated"], flax["evaluated"])), strict=True):
        assert a.dtype == b.dtype, "evaluated"
        close(case, a, b, of_y)
    if case.weight is None:
        check_given_at_call(case, own_start.get("params", {}), ours, of_y)


def check_given_at_call(case, params, ours, bound):
    """scale and bias as arguments, for all examples or for each, replace the parameters."""
    layer = build(normjax.linen, case)
    axes_of = next((case.fields[k] for k in ("feature_axes", "axis") if k in case.fields), -1)
    how = {**modes(case, False), **called_with(case, normjax.linen)}
    context, transformed = runs(case.how)

    def served(vectors):
        return layer.apply(ours["stats"], case.x, **vectors, **how)

    with context:
        for examples in ((), case.x.shape[:1]):
            if examples and 0 in canonical(axes_of, case.x.ndim):
                continue
            vectors = {k: jnp.broadcast_to(v, (*examples, *v.shape)) for k, v in params.items()}
            y = transformed(served)(vectors)
            assert y.dtype == ours["evaluated"].dtype
            close(case, y, ours["evaluated"], bound)


@pytest.mark.parametrize("name", NORMS)
def test_any_layer_agrees_with_flax(name):
    @examples(2, tests=len(NORMS))
    @hypothesis.given(cases(name))
    def compare(case):
        check(case)

    compare()
