"""Normalization by given moments: the affine map, its derivative and the dtype policy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks
from normjax._moments import wide


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Standardizes `x` by the given moments, then scales and shifts it.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: floating or complex array of any rank.
        mean, var, scale, bias: arrays that broadcast to `x` as in NumPy.
        epsilon: added to the variance, in the square of the units of `x`.
        mask: boolean, broadcasts to `x`. A non-finite entry of `x` whose mask is False is taken
            as 0; all other entries are normalized as they are.
        dtype: of the result, by default the dtype of `x`.

    Returns:
        An array of the shape of `x`, in `dtype`.

    Guarantees:
        wide inside: computed in float32 or wider whatever the dtype of `x`.
        offset costs nothing: the mean is subtracted before anything is multiplied.
        light backward: `x` in its own dtype and vectors are kept, nothing else.

    Edge cases:
        ===================================  ==================================================
        var = 0                              y = (x - mean) / sqrt(epsilon) * scale + bias
        masked NaN or infinity               taken as 0, with gradient 0
        ===================================  ==================================================

    Raises:
        TypeError: `x` is neither floating nor complex, or a complex `x` and a real `dtype`.
        ValueError: a shape does not broadcast to that of `x`, or epsilon is negative.

    References:
        Ioffe, Szegedy (2015), Batch Normalization, arXiv:1502.03167, Algorithm 1.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.normalize(jnp.array([1.0, 3.0]), mean=2.0, var=4.0, epsilon=0.0)
        Array([-0.5,  0.5], dtype=float32)
    """
    called = "normjax.normalize"
    x = _checks.inexact(called, "x", x)
    _checks.epsilon(called, epsilon)
    out = _checks.output_dtype(called, dtype, x.dtype)
    mask = _checks.mask(called, mask, x.shape)
    vectors = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    given = {
        k: _checks.broadcast(called, k, v, x.shape) for k, v in vectors.items() if v is not None
    }
    # Everything is computed in the widest dtype that came in, and float32 at least.
    widest = wide(x.dtype, *(v.dtype for v in given.values()))
    given = {k: v if k == "var" else v.astype(widest) for k, v in given.items()}
    real = jnp.finfo(widest).dtype
    var = given["var"].astype(real) + jnp.asarray(epsilon, real)
    with jax.named_scope(called):
        return _apply(x, mask, given["mean"], var, given.get("scale"), given.get("bias"), out)


@partial(jax.custom_jvp, nondiff_argnums=(6,))
def _apply(
    x: Array,
    mask: Array | None,
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    out: np.dtype,
) -> Array:
    _, gain = _gain(var, scale, mean.dtype)
    y = (_admit(x, x, mask).astype(mean.dtype) - mean) * gain
    return (y if bias is None else y + bias).astype(out)


@partial(_apply.defjvp, symbolic_zeros=True)
def _apply_jvp(out, primals, tangents):
    # With xhat = (x - mean) inv and inv = var^(-1/2), for which d inv = -inv (inv dvar inv) / 2:
    #   dy = dx gain + xhat (dscale - scale inv dvar inv / 2) + dbias - dmean gain.
    # All but two products are products of vectors. The powers of inv are applied one by one,
    # because var^(-3/2) alone leaves the range of float32 for x of the size 1e15.
    x, mask, mean, var, scale, bias = primals
    dx, _, d_mean, d_var, d_scale, d_bias = tangents
    inv, gain = _gain(var, scale, mean.dtype)
    shift = -_dense(d_mean) * gain
    slope = -0.5 * gain * (_dense(d_var).astype(mean.dtype) * inv * inv)
    if scale is not None:
        slope = slope + _dense(d_scale) * inv
    if bias is not None:
        shift = shift + _dense(d_bias)
    dx = None if isinstance(dx, SymbolicZero) else dx
    y = _apply(x, mask, mean, var, scale, bias, out)
    return y, _tangent(out)(x, mask, mean, gain, dx, slope, shift)


def _tangent(out: np.dtype):
    """dy = dx gain + (x - mean) slope + shift, linear in (dx, slope, shift)."""

    # Under checkpoint the backward pass keeps x in its own dtype and vectors, not x - mean.
    @partial(jax.checkpoint, prevent_cse=False)
    def tangent(x, mask, mean, gain, dx, slope, shift):
        dy = (_admit(x, x, mask).astype(mean.dtype) - mean) * slope + shift
        if dx is not None:
            dy = dy + _admit(dx, x, mask).astype(mean.dtype) * gain
        return dy.astype(out)

    return tangent


def _gain(var: Array, scale: Array | None, dtype: np.dtype) -> tuple[Array, Array]:
    inv = lax.rsqrt(var).astype(dtype)
    return inv, inv if scale is None else inv * scale


def _admit(values: Array, x: Array, mask: Array | None) -> Array:
    """Lets in what counts and what is finite; a masked NaN in `x` becomes 0 by selection."""
    if mask is None:
        return values
    return jnp.where(mask | jnp.isfinite(x), values, jnp.zeros((), values.dtype))


def _dense(tangent):
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros(tangent.shape, tangent.dtype)
    return tangent
