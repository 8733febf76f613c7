"""Batch norm and an invertible activation that together keep nothing but their output."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks
from normjax._batch import check, enough, evaluate, with_kept
from normjax._moments import (
    Moments,
    measured,
    moment_tangents,
    or_one,
    synchronize,
    wide,
    widened,
)
from normjax._normalize import apply, denormalize, normalized_tangent
from normjax._stats import BatchStats, move
from normjax._walks import after, apart, diagonal


class Invertible(Protocol):
    """An activation that can be computed backwards; hashable."""

    def __call__(self, y: Array) -> Array:
        """The activation."""

    def inverse(self, z: Array) -> Array:
        """The y of which it made z."""


@dataclass(frozen=True)
class LeakyReLU:
    """z = y for y >= 0, negative_slope * y below (Maas, Hannun, Ng 2013), and its inverse.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.LeakyReLU(0.5)(jnp.array([-2.0, 2.0]))
        Array([-1.,  2.], dtype=float32)
    """

    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        _checks.slope("normjax.LeakyReLU", "negative_slope", self.negative_slope)

    def __call__(self, y: Array) -> Array:
        """The activation."""
        return jnp.where(y >= 0, y, self.negative_slope * y)

    def inverse(self, z: Array) -> Array:
        """The y of which it made z."""
        # Without a selection, which XLA's CPU compiler does not fuse into a sum, and with a slope
        # of its own, since one that layers share is written to memory in the shape of z.
        z, slope = apart((z, jnp.full((), self.negative_slope, z.dtype)))
        return (jnp.minimum if self.negative_slope <= 1 else jnp.maximum)(z, z / slope)


@dataclass(frozen=True)
class ELU:
    """z = y for y > 0, alpha (exp(y) - 1) below (arXiv:1511.07289), and its inverse.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.ELU()(jnp.array([-1.0, 2.0])).round(2)
        Array([-0.63,  2.  ], dtype=float32)
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _checks.slope("normjax.ELU", "alpha", self.alpha)

    def __call__(self, y: Array) -> Array:
        """The activation."""
        return jnp.where(y > 0, y, self.alpha * jnp.expm1(jnp.minimum(y, 0)))

    def inverse(self, z: Array) -> Array:
        """The y of which it made z."""
        # Where exp(y) has been lost beside 1 there is no y left but the gradient is zero anyway.
        least = jnp.finfo(z.dtype).eps - 1
        below = jnp.log1p(jnp.maximum(jnp.minimum(z, 0) / self.alpha, least))
        return jnp.maximum(z, 0) + below


def batch_norm_act(
    x: ArrayLike,
    stats: BatchStats | None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    train: bool,
    activation: Invertible = LeakyReLU(),
    feature_axis: int | Collection[int] = -1,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    ddof: float = 0,
    debias: bool = False,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, BatchStats | None]:
    """Batch norm and activation in one, for less memory: the backward pass needs only the output.

        z = activation(y),   y = (x - mean) / sqrt(var + epsilon) * scale + bias

    and x is computed from z where a derivative needs it. The next layer keeps z anyway, and so
    nothing is kept for this one, where batch norm would keep its input. It pays for deep stacks of
    convolutions whose activations fill the memory; it costs one more elementwise pass.

    Args:
        x: real floating array; everything else but `activation` as in `batch_norm`.
        stats, scale, bias, train, feature_axis, momentum, epsilon, ddof, debias, mask, axis_name,
            axis_index_groups, dtype: as in `batch_norm`.
        activation: `LeakyReLU()`, `ELU()`, or any hashable with `__call__` and `inverse`.

    Returns:
        `(z, stats)`, as in `batch_norm`.

    Guarantees:
        same result: z and stats are those of `batch_norm` and the activation after it.
        light backward: z in its own dtype and vectors are kept, nothing else.

    Edge cases:
        ===================================  ==================================================
        scale = 0                            z says nothing about x: no gradient for scale
        ===================================  ==================================================

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as in `batch_norm`.
        TypeError: a complex `x`, or an activation without `inverse`.

    References:
        Rota Bulo, Porzi, Kontschieder (2018), In-Place Activated BatchNorm, arXiv:1712.02616.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> x = jnp.array([[0.0], [4.0]])
        >>> z, stats = normjax.batch_norm_act(x, None, train=True, activation=normjax.ELU())
        >>> z.round(2).ravel()
        Array([-0.63,  1.  ], dtype=float32)
    """
    z, stats, _ = keeping_batch_norm_act(
        x, stats, scale, bias, None, train=train, activation=activation, feature_axis=feature_axis,
        momentum=momentum, epsilon=epsilon, ddof=ddof, debias=debias, mask=mask,
        axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype,
    )  # fmt: skip
    return z, stats


def keeping_batch_norm_act(
    x: Any, stats: Any, scale: Any, bias: Any, kept: Moments | None, *, train: Any,
    activation: Invertible, feature_axis: Any, momentum: Any, epsilon: Any, ddof: Any, debias: Any,
    mask: Any, axis_name: Any, axis_index_groups: Any, dtype: Any,
) -> tuple[Array, Any, Moments | None]:  # fmt: skip
    """`batch_norm_act`, which keeps moments as `keeping_batch_norm` does."""
    called = "normjax.batch_norm_act"
    _checks.invertible(called, activation)
    x = _checks.inexact(called, "x", x, real=True)
    given = check(
        called, x, stats, scale, bias, train, feature_axis, momentum, epsilon, ddof, debias, mask,
        axis_name, axis_index_groups, dtype,
    )  # fmt: skip
    if stats is not None and not train:
        y = evaluate(called, given._replace(dtype=wide(given.dtype)), epsilon)
        return activation(y).astype(given.dtype), stats, None
    enough(called, given, axis_name, axis_index_groups)
    affine = [v for v in (given.scale, given.bias) if v is not None]
    dtype = wide(given.x.dtype, given.dtype, *(v.dtype for v in affine))

    def share(moments: Moments) -> Moments:
        if axis_name is None:
            return moments
        return synchronize(moments, axis_name, axis_index_groups)

    def vectors(moments: Moments) -> tuple[Any, ...]:
        mean, var = (jnp.expand_dims(v, given.reduced) for v in (moments.mean, moments.variance()))
        var = var.astype(dtype) + jnp.asarray(epsilon, dtype)
        rest = (v if v is None else v.astype(dtype) for v in (given.scale, given.bias))
        return mean.astype(dtype), var, *rest

    with jax.named_scope(called):
        x = given.x
        if given.mask is not None:
            x = jnp.where(given.mask | jnp.isfinite(x), x, jnp.zeros((), x.dtype))
        wide_x = widened(x)
        own = measured(x, wide_x, given.reduced, given.mask)
        whole = share(own)
        known = vectors(whole)
        z = activation(apply(x, wide_x, None, *known, dtype)).astype(given.dtype)
        # Now that the output is there the same values once more, with derivatives that need it.
        moments = share(_measured(activation, given.reduced, wide_x, z, known, given.mask, own))
        z = _finished(activation, wide_x, z, vectors(moments))
        batch = with_kept(kept, whole)
        if train and given.stats is not None:
            stats = move(given.stats, batch, momentum=momentum, debias=debias, ddof=ddof)
    return z, stats, batch


def _origin(activation: Invertible, t: Array, z: Array, mean: Array, *rest: Any) -> Array:
    """The x of which z was made, computed when t is there."""
    return denormalize(activation.inverse(after(z, t).astype(mean.dtype)), mean, *rest)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _measured(
    activation: Invertible, axes: Any, wide_x: Array, z: Array, vectors: Any, mask: Any,
    own: Moments,
) -> Moments:  # fmt: skip
    """The moments `own` of x, whose derivative takes x from z."""
    return own


@_measured.defjvp
def _measured_jvp(activation, axes, primals, tangents):
    _, z, vectors, mask, own = primals
    origin = partial(_origin, activation)
    mean = jnp.expand_dims(own.mean, axes)
    divisor = or_one(own.count)
    divisor = divisor if np.ndim(divisor) == 0 else jnp.expand_dims(divisor, axes)
    moved = moment_tangents((z, *vectors), origin, mask, divisor, mean, tangents[0], axes)
    d_mean, d_m2 = (jnp.squeeze(d, axes) for d in moved)
    return own, Moments(jnp.zeros_like(own.count), d_mean, d_m2)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _finished(activation: Invertible, wide_x: Array, z: Array, vectors: Any) -> Array:
    """The output z of x, whose derivative takes x from z."""
    return z


@_finished.defjvp
def _finished_jvp(activation, primals, tangents):
    _, z, vectors = primals
    dx, _, d_vectors = tangents
    dtype = vectors[0].dtype

    def activated(dy, z):
        y = activation.inverse(after(z, dy).astype(dtype))
        return jax.jvp(activation, (y,), (dy,))[1]

    kept, origin = (z, *vectors), partial(_origin, activation)
    dy = normalized_tangent(kept, origin, None, vectors, dx, d_vectors, dtype)
    return z, diagonal(activated, dy, z).astype(z.dtype)
