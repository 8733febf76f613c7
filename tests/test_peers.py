"""Comparison with PyTorch, and errors of Flax that normjax does not have."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import BatchStats, batch_norm
from tests.reference import EPS
from tests.shapes import SHAPES, reduced


@pytest.fixture
def torch():
    """PyTorch, which is optional: pip install "normjax[torch]"."""
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def by_torch(torch, x, scale, bias, dy, axes, momentum):
    """y, running statistics and gradients by torch.nn.functional, features moved to axis 1."""
    kept = [a for a in range(x.ndim) if a not in axes]
    order = [*axes[:1], *kept, *axes[1:]]
    moved_shape = [x.shape[a] for a in order]
    flat = [moved_shape[0], scale.size, -1]

    def to_torch(v):
        return torch.tensor(np.transpose(v, order).reshape(flat).copy())

    tx = to_torch(x).requires_grad_()
    ts, tb = (torch.tensor(v.reshape(-1)).requires_grad_() for v in (scale, bias))
    mean, var = torch.zeros(scale.size, dtype=tx.dtype), torch.ones(scale.size, dtype=tx.dtype)
    y = torch.nn.functional.batch_norm(
        tx, mean, var, ts, tb, training=True, momentum=1 - momentum, eps=1e-5
    )
    y.backward(to_torch(dy))

    def back(v):
        return np.transpose(v.detach().numpy().reshape(moved_shape), np.argsort(order))

    shape = scale.shape
    vectors = (v.detach().numpy().reshape(shape) for v in (ts.grad, tb.grad, mean, var))
    return back(y), back(tx.grad), *vectors


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 3e-5)])
def test_equals_pytorch(rng, torch, x64, name, dtype, tolerance):
    shape, feature_axis = SHAPES[name]
    axes = reduced(shape, feature_axis)
    features = [n for a, n in enumerate(shape) if a not in axes]
    x, dy = (rng.normal(1, 2, shape).astype(dtype) for _ in range(2))
    scale, bias = (rng.normal(size=features).astype(dtype) for _ in range(2))

    def f(x, scale, bias):
        stats = BatchStats.make(features, dtype)
        return batch_norm(
            x, stats, scale, bias, train=True, feature_axis=feature_axis, momentum=0.9, ddof=1
        )

    @jax.jit
    def both(x, scale, bias, dy):
        y, pullback, stats = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, *pullback(dy), stats.mean, stats.var

    ours = both(x, scale, bias, dy)
    theirs = by_torch(torch, x, scale, bias, dy, axes, 0.9)
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1, x.size / 50))


def flax_variance_on_devices(x, mask):
    norm = nn.BatchNorm(use_running_average=False, axis_name="d", momentum=0.0)
    variables = norm.init(jax.random.key(0), x[0])

    def step(x, mask):
        return norm.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]["var"]

    return np.asarray(jax.vmap(step, axis_name="d")(x, mask))[0]


def our_variance_on_devices(x, mask):
    step = partial(batch_norm, train=True, momentum=0.0, axis_name="d")
    stats = jax.vmap(lambda x, m: step(x, BatchStats.make(1), mask=m)[1], axis_name="d")(x, mask)
    return np.asarray(stats.var)[0]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("last", [1, 0])
def test_flax_averages_the_means_of_unequal_devices(rng, last):
    """google/flax#2417: a mean of means, and NaN on all devices if one has no valid row."""
    x = (rng.normal(size=(4, 8, 1)) + np.arange(4).reshape(4, 1, 1)).astype(np.float32)
    mask = np.arange(8).reshape(1, 8, 1) < np.array([8, 2, 5, last]).reshape(4, 1, 1)
    want = x[mask].astype(np.float64).var()
    np.testing.assert_allclose(our_variance_on_devices(x, mask), [want], rtol=8 * EPS["float32"])
    assert not abs(flax_variance_on_devices(x, mask)[0] / want - 1) < 0.1


@pytest.mark.usefixtures("lenient")
def test_flax_lets_a_masked_nan_into_every_gradient():
    """jax-ml/jax#26328."""
    x = jnp.arange(12.0).reshape(6, 2).at[4:].set(jnp.nan)
    mask = (jnp.arange(6) < 4)[:, None]
    norm = nn.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)

    def by_flax(x):
        return norm.apply(variables, x, mask=mask, mutable=["batch_stats"])[0]

    def by_normjax(x):
        return batch_norm(x, None, train=True, mask=mask)[0]

    for norm_of, finite in ((by_flax, False), (by_normjax, True)):

        def loss(x, f=norm_of):
            return jnp.sum(jnp.where(mask, f(x), 0) ** 3)

        grad = jax.jit(jax.grad(loss))(x)
        assert np.isfinite(grad[:4]).all() == finite


@pytest.mark.usefixtures("lenient")
def test_one_nan_in_x_stays_in_the_running_statistics_of_flax(rng):
    x = rng.normal(size=(8, 2)).astype(np.float32)
    x[0, 0] = np.nan
    norm = nn.BatchNorm(use_running_average=False)
    _, updates = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert np.isnan(updates["batch_stats"]["mean"][0])
    _, stats = batch_norm(x, BatchStats.make(2), train=True)
    assert np.isfinite(stats.mean).all()
