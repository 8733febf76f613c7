"""From x to y: measured, shared, normalized; the affine map, its derivative, the dtype policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks
from normjax._moments import Moments, measured, synchronize, wide, widened
from normjax._walks import (
    apart,
    broadcast_together,
    diagonal,
    input_of_norm,
    moments_of_norm,
    rounded_sum,
    written,
)

Activation: TypeAlias = Callable[[Array], Array]


@_checks.named("normjax.normalize")
def normalize(
    x: ArrayLike,
    mean: ArrayLike | None,
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
        mean, var, scale, bias: arrays that broadcast to `x` as in NumPy. All but var may be None:
            a mean of 0, a scale of 1, a bias of 0.
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
    x = _checks.inexact("normjax.normalize", "x", x)
    options: dict[str, Any] = dict(epsilon=epsilon, mask=mask, dtype=dtype)
    return normalized(x, widened(x), mean, var, scale, bias, **options)


def standardize(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
    *,
    epsilon: ArrayLike,
    axes: tuple[int, ...],
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    dtype: np.dtype,
    centered: bool = True,
    pooled: Callable[[Moments], Moments] | None = None,
    activation: Activation | None = None,
) -> tuple[Array, Moments]:
    """The one way through the house: measure, pool, share, normalize. Returns y and the moments.

    All is checked before. Arguments that are not arrays, `pooled` and `activation` included, are
    static; equal ones share a trace.
    """
    names = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    groups = None if axis_index_groups is None else tuple(map(tuple, axis_index_groups))
    how = axes, names, groups, dtype, centered, pooled, activation
    # Around the call: jax.vmap meets what it cannot share when the function has been traced.
    with _checks.grouped("normjax.synchronize", axis_name, axis_index_groups):
        return _standardize(x, scale, bias, mask, epsilon, *how)


@partial(jax.jit, static_argnums=range(5, 12))
def _standardize(
    x: Array, scale: Any, bias: Any, mask: Any, epsilon: Any, axes: tuple[int, ...],
    axis_name: Any, axis_index_groups: Any, dtype: np.dtype, centered: bool, pooled: Any,
    activation: Activation | None,
) -> tuple[Array, Moments]:  # fmt: skip
    # A function of its own for checkpoint policies too: where the function that makes what a policy
    # keeps goes on to use it, JAX rounds it (reduce_precision), and XLA's CPU compiler then holds
    # x and the rounded x. A stack of convolutions took 1.4 times the memory.
    x = input_of_norm(x)
    wide_x = widened(x)
    moments = measured(x, wide_x, axes, mask, centered=centered)
    moments = moments if pooled is None else pooled(moments)
    if axis_name is not None:
        moments = synchronize(moments, axis_name, axis_index_groups)
    moments = moments_of_norm(moments)
    mean, var = (jnp.expand_dims(v, axes) for v in (moments.mean, moments.variance()))
    vectors = mean if centered else None, var, scale, bias
    options: dict[str, Any] = dict(epsilon=epsilon, mask=mask, dtype=dtype, activation=activation)
    return normalized(x, wide_x, *vectors, **options), moments


def normalized(
    x: Array,
    wide_x: Array,
    mean: ArrayLike | None,
    var: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    epsilon: ArrayLike,
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
    activation: Activation | None = None,
) -> Array:
    """`normalize` and an activation, where x moves along `wide_x`, as in `measured`."""
    called = "normjax.normalize"
    _checks.epsilon(called, epsilon)
    out = _checks.output_dtype(called, dtype, x.dtype)
    mask = _checks.mask(called, mask, x.shape)
    # A real result has no room for a complex vector, and a variance is real by its nature.
    is_real = not jnp.issubdtype(out, jnp.complexfloating)
    number = jnp.finfo(wide(x.dtype)).dtype

    def vector(name: str, value: ArrayLike | None) -> Any:
        if value is None:
            return None
        return _checks.broadcast(called, name, value, x.shape, number, real=is_real)

    vectors = vector("mean", mean), vector("scale", scale), vector("bias", bias)
    spread = _checks.broadcast(called, "var", var, x.shape, number, real=True)
    # Everything is computed in the widest dtype that came in, and float32 at least.
    widest = wide(x.dtype, spread.dtype, *(v.dtype for v in vectors if v is not None))
    center, gain, shift = (v if v is None else v.astype(widest) for v in vectors)
    real = jnp.finfo(widest).dtype
    spread = spread.astype(real) + jnp.asarray(epsilon, real)
    with jax.named_scope(called):
        return _jitted_apply(x, wide_x, mask, center, spread, gain, shift, out, activation)


@partial(jax.custom_jvp, nondiff_argnums=(7, 8))
def apply(
    x: Array,
    wide_x: Array,
    mask: Array | None,
    mean: Array | None,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    out: np.dtype,
    activation: Activation | None,
) -> Array:
    """The map itself; vectors in the rank of x and in one dtype, epsilon added to `var`."""
    number = _number(x, mean, var, scale, bias)
    gain = lax.rsqrt(var).astype(number)
    if scale is not None and _folds(scale, gain):
        gain, scale = gain * scale, None
    # A product of two vectors that has the size of x would be an operation more for each entry.
    y = _deviation(_admit(x, x, mask).astype(number), mean) * gain
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return (y if activation is None else activation(y)).astype(out)


# Layers of one shape are traced once: a ResNet-50 compiles in 1.1 and not 1.2 of Flax's time.
_jitted_apply = jax.jit(apply, static_argnums=(7, 8), inline=True)


@partial(apply.defjvp, symbolic_zeros=True)
def _apply_jvp(out, activation, primals, tangents):
    x, _, mask, *vectors = primals
    _, dx, _, *d_vectors = map(_given, tangents)
    y = apply(*primals, out, activation)
    dy = _normalized_tangent(x, mask, vectors, dx, d_vectors, out)
    if activation is None:
        return y, dy

    def activated(dy, x, mask, *vectors):
        # y is computed anew from x: kept, it would be one more array of the size of x.
        x, vectors = apart((x, vectors), walk=4)
        y = apply(x, widened(x), mask, *vectors, _number(x, *vectors), None)
        # Under vmap dy may be that of each example, and x of all.
        (y,) = broadcast_together(dy.shape, [y], [dy])
        return jax.jvp(activation, (y,), (dy.astype(y.dtype),))[1].astype(out)

    return y, diagonal(activated, dy, x, mask, *vectors)


def _normalized_tangent(
    x: Array, mask: Array | None, vectors: Sequence[Any], dx: Array | None,
    d_vectors: Sequence[Any], out: np.dtype,
) -> Array:  # fmt: skip
    """The derivative of y, linear in the tangents; what is None there is zero and costs nothing.

    With inv = var^(-1/2), for which d inv = -inv (inv dvar inv) / 2:

        dy = (dx inv + (x - mean) d_inv - d_mean inv) scale + (x - mean) inv d_scale + d_bias
    """
    mean, var, scale, _ = vectors
    d_mean, d_var, d_scale, d_bias = d_vectors
    number = _number(x, *vectors)
    # The powers of inv are applied one by one, because var^(-3/2) alone leaves the range of
    # float32 for x of the size 1e15.
    inv = lax.rsqrt(var).astype(number)
    shift = None if d_mean is None else -d_mean * inv
    slope = None if d_var is None else -0.5 * inv * (d_var.astype(number) * inv * inv)
    if _folds(scale, inv):
        # A scale that is one number for each statistic, as in batch norm, is multiplied in while
        # all are vectors. The backward pass then needs two sums over dy and not four.
        shift, slope = _product(shift, scale), _product(slope, scale)
        slope = _sum(slope, _product(d_scale, inv))
        inv, scale, d_scale = inv * scale, None, None
    if scale is None and _folds(d_bias, inv):
        shift, d_bias = _sum(shift, d_bias), None

    slope, shift = _outside(slope), _outside(shift)

    def deviated(t, mask, mean, x):
        mean, x = apart((mean, x), walk=2)
        return _deviation(_admit(x, x, mask).astype(number), mean) * t

    def standardized(t, mask, inv, mean, x):
        # t times the vector comes first: the CPU takes up to 5 times as long for a sum over rows
        # of a product of two arrays that is then multiplied by a vector.
        inv, mean, x = apart((inv, mean, x))
        return deviated(t * inv, mask, mean, x)

    def admitted(t, mask, x):
        return _admit(t, x, mask)

    if dx is not None:
        dx = dx.astype(number)
        dx = dx if mask is None else diagonal(admitted, dx, mask, x)
    within = [
        _product(dx, apart(inv)),
        slope if slope is None else diagonal(deviated, slope, mask, mean, x, shape=x.shape),
        shift,
    ]
    if scale is not None:
        # A product of two vectors would lie on the devices as both do, and not as x does.
        if shift is not None:
            within[2:] = broadcast_together(x.shape, [shift], jax.tree.leaves((x, mask, vectors)))
        own = apart((scale, scale, scale))
        within = [_product(term, s) for term, s in zip(within, own, strict=True)]
    beyond = d_scale
    if d_scale is not None:
        beyond = diagonal(standardized, d_scale, mask, inv, mean, x, shape=x.shape)
    terms = [term for term in (*within, beyond, d_bias) if term is not None]
    terms = terms or [jnp.zeros((1,) * x.ndim, number)]
    return rounded_sum(x.shape, out, *terms, beside=(x, mask, vectors))


def _folds(vector: Array | None, statistic: Array) -> bool:
    """Whether `vector` is constant over what the statistic was taken over."""
    if vector is None:
        return False
    return jnp.broadcast_shapes(vector.shape, statistic.shape) == statistic.shape


def _outside(vector: Array | None) -> Array | None:
    """One number a row is written: XLA's CPU compiler would compute it inside of a sum over rows,
    a number at a time, which took layer norm over 96 features 1.5 times as long."""
    return written(vector) if vector is not None and vector.shape[-1:] == (1,) else vector


def _number(*arrays: Any) -> np.dtype:
    return wide(*(v.dtype for v in arrays if v is not None))


def _deviation(x: Array, mean: Array | None) -> Array:
    return x if mean is None else x - mean


def _admit(values: Array, x: Array, mask: Array | None) -> Array:
    """Lets in what counts and what is finite; a masked NaN in `x` becomes 0 by selection."""
    if mask is None:
        return values
    return jnp.where(mask | jnp.isfinite(x), values, jnp.zeros((), values.dtype))


def _given(tangent: Any) -> Any:
    return None if isinstance(tangent, SymbolicZero) else tangent


def _product(a: Array | None, b: Array | None) -> Array | None:
    return None if a is None or b is None else a * b


def _sum(*terms: Array | None) -> Array | None:
    return reduce(lambda a, b: b if a is None else a if b is None else a + b, terms)
