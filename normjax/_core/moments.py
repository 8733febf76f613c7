"""Moments, their merge over pieces of data, and their merge over devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._core.devices import AxisName, Groups, total_over_devices
from normjax._core.dtypes import abs_square, accumulation_dtype, real_dtype
from normjax._core.mask import Count, safe_count
from normjax._core.remat import moments_of_norm


class Moments(NamedTuple):
    """The number of entries, their mean, and the sum of their squared deviations from it.

        count = sum of 1,   mean = sum of x / count,   m2 = sum of |x - mean|^2

    Moments of two pieces of data merge into the moments of both (`merge`), moments of several
    devices into the moments of all (`synchronize`). `Moments(0, 0, 0)` is the neutral element.

    Attributes:
        count: float32 or float64, of shape () if all features have the same count, else of the
            shape of `mean`.
        mean: float32, float64, complex64 or complex128; the shape of the axes that were kept.
        m2: real, the shape of `mean`.
    """

    count: Count  # type: ignore[assignment]  # hides tuple.count, as meant
    mean: Array
    m2: Array

    @classmethod
    @_errors.named("normjax.Moments.make")
    def make(cls, shape: int | Sequence[int], dtype: DTypeLike = jnp.float32) -> Moments:
        """Moments of no data, with a count for each feature: the initial value of merges.

        The mean has `dtype`, or float32 if that is wider; count and m2 are real.

        Example:
            >>> import normjax
            >>> normjax.Moments.make(2).count
            Array([0., 0.], dtype=float32)
        """
        shape = _errors.shape(shape)
        dtype = accumulation_dtype(_errors.output_dtype(dtype, np.dtype("float32")))
        real = real_dtype(dtype)
        return cls(jnp.zeros(shape, real), jnp.zeros(shape, dtype), jnp.zeros(shape, real))

    @_errors.named("normjax.Moments.variance")
    def variance(self, ddof: float = 0) -> Array:
        """m2 / (count - ddof): biased for `ddof=0`, unbiased for `ddof=1`.

        0 where no degree of freedom is left (count <= ddof), so that 0/0 makes no gradient NaN.
        """
        freedom = self.count - _errors.ddof(ddof, self.m2.shape)
        some = (freedom > 0).astype(self.m2.dtype)
        return self.m2 / safe_count(freedom).astype(self.m2.dtype) * some


@_errors.named("normjax.merge")
def merge(first: Moments, *others: Moments) -> Moments:
    """Merges moments of pieces of data into the moments of all data.

        count = sum of counts,   mean = sum of count_i mean_i / count,
        m2 = sum of m2_i + count_i |mean_i - mean|^2

    Args:
        first, others: moments over equal features.

    Returns:
        `Moments` of the concatenated data.

    Guarantees:
        monoid: associative and commutative to rounding; moments with count 0 change nothing.

    Raises:
        TypeError: an argument is not `Moments`.
        ValueError: the moments have different features.

    References:
        Chan, Golub, LeVeque (1983), the pairwise merge, here for any number of pieces at once.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> a = normjax.measure(jnp.array([1.0, 2.0]), axis=0)
        >>> b = normjax.measure(jnp.array([6.0]), axis=0)
        >>> normjax.merge(a, b).mean
        Array(3., dtype=float32)
    """
    pieces = (first, *others)
    for piece in pieces:
        _errors.moments(piece, Moments)
    features = _errors.common_shape([jnp.shape(m.mean) for m in pieces])
    # A count shared by all features stays one number if all pieces have such a count.
    counted = _errors.common_shape([jnp.shape(m.count) for m in pieces])
    count = _stack([m.count for m in pieces], counted or (1,) * len(features))
    mean = _stack([m.mean for m in pieces], features)
    m2 = _stack([m.m2 for m in pieces], features)
    pooled = collapse(Moments(count, mean, m2))
    return pooled._replace(count=pooled.count.reshape(counted))


def collapse(stacked: Moments) -> Moments:
    """Merges moments that are stacked along their first axis; a scalar count is that of each."""
    pieces, *features = stacked.mean.shape
    single = np.ndim(stacked.count) == 0
    count = stacked.count
    if single:
        count = jnp.full((pieces, *(1 for _ in features)), count)
    total = partial(jax.tree.map, partial(jnp.sum, axis=0, keepdims=True))
    pooled = _pool(stacked._replace(count=count), total)
    count, mean, m2 = (jnp.squeeze(leaf, axis=0) for leaf in pooled)
    return Moments(count.reshape(()) if single else count, mean, m2)


@_errors.named("normjax.synchronize")
def synchronize(
    moments: Moments,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Merges the moments of all devices along `axis_name` into the moments of the whole batch.

    The formula is that of `merge`, with sums over the named axis. It takes two small reductions,
    the second around the mean of the first, and one of two vectors for the gradient. `batch_norm`
    needs only one if its running mean is near the mean (docs/devices.md).

    Args:
        moments: measured on this device.
        axis_name: one name or several, bound by `pmap`, `shard_map` or `vmap`.
        axis_index_groups: groups of devices, each of which merges its moments, as in
            `jax.lax.psum`.

    Returns:
        `Moments`, equal on all devices (of a group).

    Guarantees:
        shared exactly: equal to measuring the concatenated batch, in value and gradient, for any
            counts, a device without a valid entry included.

    Raises:
        TypeError: `moments` is not `Moments`.
        NameError: `axis_name` is not bound.
        ValueError: `axis_index_groups` do not name each device once.
        NotImplementedError: `axis_index_groups` where JAX does not implement it: under `vmap`, and
            of unequal size under `shard_map` with `check_vma=True`.

    References:
        Chan, Golub, LeVeque (1983), the pairwise merge, over all devices at once.

    Example:
        >>> import jax, jax.numpy as jnp, normjax
        >>> def share(x):
        ...     return normjax.synchronize(normjax.measure(x, axis=0), "batch").mean
        >>> jax.vmap(share, axis_name="batch")(jnp.array([[1.0, 3.0], [5.0, 7.0]]))
        Array([4., 4.], dtype=float32)
    """
    _errors.moments(moments, Moments)
    _errors.axis_size(axis_name, axis_index_groups)
    with jax.named_scope("normjax.synchronize"), _errors.grouped(axis_name, axis_index_groups):
        return synchronized(moments, axis_name, axis_index_groups)


def synchronized(moments: Moments, axis_name: AxisName, groups: Groups = None) -> Moments:
    """`synchronize` without the checks of its arguments."""
    if groups is not None:
        # psum multiplies a constant by the size of the first group, for all groups.
        moments = moments._replace(count=jnp.full_like(moments.m2, moments.count))
    return _pool(moments, lambda v: total_over_devices(v, axis_name, groups))


def _pool(moments: Moments, total: Callable) -> Moments:
    """The merge formula; `total` sums over pieces or devices."""
    count, mean, m2 = moments
    pooled_count = total(count)
    entries = safe_count(pooled_count)
    divisor = entries.astype(mean.dtype)
    # The mean of no entries is 0, since their weighted sum is 0.
    rough = moments_of_norm(total(_scaled(mean, count)) / divisor)
    # Corrected as in `measure`, so that pieces of one constant merge into that constant. The
    # correction is zero but for rounding, and so is its derivative.
    off = lax.stop_gradient(_scaled(mean - rough, count))
    # Two sums, which XLA combines: JAX 0.7 cannot transpose a sum of which a part is constant.
    lost, squares = total(off), total(m2 + _between(count, mean, rough))
    rest = lost / divisor
    # On overflow it is infinite, and not the difference of two infinities.
    corrected = squares - abs_square(rest) * entries
    squares = moments_of_norm(jnp.where(jnp.isfinite(squares), corrected, squares))
    # Values below 0 come only from rounding. They are subtracted as a constant: a selection or a
    # maximum would also remove the derivative, and the second derivative is not 0 there.
    return Moments(pooled_count, rough + rest, squares - lax.stop_gradient(jnp.minimum(squares, 0)))


@jax.custom_jvp
def _between(count: Count, mean: Array, pooled_mean: Array) -> Array:
    """What a piece adds to m2 because its mean differs from the pooled mean."""
    return abs_square(mean - pooled_mean) * count


@_between.defjvp
def _between_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # The term with d pooled_mean is missing because the pieces' deviations sum to zero. Autodiff
    # would compute that zero with one more reduction over the devices.
    count, mean, pooled_mean = primals
    slope = 2 * jnp.asarray(count).astype(mean.dtype) * jnp.conj(mean - pooled_mean)
    return _between(*primals), jnp.real(slope * tangents[1])


def _stack(leaves: Sequence[ArrayLike], shape: tuple[int, ...]) -> Array:
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    dtype = accumulation_dtype(*(a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.inexact)))
    return jnp.stack([jnp.broadcast_to(a.astype(dtype), shape) for a in arrays])


def _scaled(mean: Array, count: Count) -> Array:
    return mean * jnp.asarray(count).astype(mean.dtype)
