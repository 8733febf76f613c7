"""Moments are a monoid: measure data, merge what was measured, share it over devices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normjax import _checks
from normjax._walks import apart, diagonal, moments_of_norm, summed

Count: TypeAlias = Array | np.ndarray | np.floating

_HALF = (np.dtype(jnp.float16), np.dtype(jnp.bfloat16))


class Moments(NamedTuple):
    """How many entries, their mean, and the sum of their squared deviations from it.

        count = sum of 1,   mean = sum of x / count,   m2 = sum of |x - mean|^2

    Moments of two pieces of data merge into the moments of both (`merge`), moments of several
    devices into the moments of all (`synchronize`). `Moments(0, 0, 0)` is the neutral element.

    Attributes:
        count: float32 or float64, shape () where every feature has equally many entries, else
            the shape of `mean`.
        mean: float32, float64, complex64 or complex128; the shape of the axes that were kept.
        m2: real, the shape of `mean`.
    """

    count: Count  # type: ignore[assignment]  # hides tuple.count, as meant
    mean: Array
    m2: Array

    @classmethod
    def make(cls, shape: int | Sequence[int], dtype: DTypeLike = jnp.float32) -> Moments:
        """Moments of nothing, with a count for each feature: where a fold over `merge` starts.

        Of `dtype`, or of float32 if that is narrower; count and m2 are real.

        Example:
            >>> import normjax
            >>> normjax.Moments.make(2).count
            Array([0., 0.], dtype=float32)
        """
        shape = _checks.shape("normjax.Moments.make", shape)
        dtype = wide(_checks.output_dtype("normjax.Moments.make", dtype, np.dtype("float32")))
        real = jnp.finfo(dtype).dtype
        return cls(jnp.zeros(shape, real), jnp.zeros(shape, dtype), jnp.zeros(shape, real))

    def variance(self, ddof: float = 0) -> Array:
        """m2 / (count - ddof): biased for `ddof=0`, unbiased for `ddof=1`.

        0 where no degree of freedom is left (count <= ddof), so that 0/0 poisons no gradient.
        """
        freedom = self.count - _checks.ddof("normjax.Moments.variance", ddof, self.m2.shape)
        where = np.where if isinstance(freedom, np.generic) else jnp.where
        return self.m2 / where(freedom > 0, freedom, np.inf).astype(self.m2.dtype)


def measure(
    x: ArrayLike,
    axis: int | Collection[int],
    mask: ArrayLike | None = None,
    *,
    centered: bool = True,
) -> Moments:
    """Measures the moments of `x` over the axes `axis`.

        mean = sum(x) / count,   m2 = sum(|x - mean|^2)

    Args:
        x: floating or complex array of any rank.
        axis: the axis or axes to reduce; the others are kept, in their order.
        mask: boolean, True where an entry counts; broadcasts to `x` as in NumPy.
        centered: around the mean; False measures around zero: mean = 0, m2 = sum(|x|^2).

    Returns:
        `Moments` in float32 or wider, of the shape of the kept axes.

    Guarantees:
        exact variance: m2 is summed around the mean, never a difference of large numbers.
        masked out means out: an entry whose mask is False, NaN and infinity included, reaches
            neither the moments nor any derivative.
        light backward: `x` in its own dtype and vectors are kept, nothing else.

    Edge cases:
        ===================================  ==================================================
        no entry                             count, mean and m2 are 0
        ===================================  ==================================================

    Raises:
        TypeError: `x` is neither floating nor complex, or `mask` is not boolean.
        ValueError: an axis is out of range or named twice, or `mask` does not broadcast.

    References:
        Chan, Golub, LeVeque (1983), Algorithms for computing the sample variance: the corrected
        two-pass algorithm (1.7).

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> moments = normjax.measure(jnp.array([[1.0, 2.0], [3.0, 6.0]]), axis=0)
        >>> moments.mean, moments.variance()
        (Array([2., 4.], dtype=float32), Array([1., 4.], dtype=float32))
    """
    x = _checks.inexact("normjax.measure", "x", x)
    axes = _checks.axes("normjax.measure", "axis", axis, x.shape)
    centered = _checks.switch("normjax.measure", "centered", centered)
    mask = _checks.mask("normjax.measure", mask, x.shape)
    return measured(x, widened(x), axes, mask, centered=centered)


def measured(
    x: Array, wide_x: Array, axes: tuple[int, ...], mask: Array | None, *, centered: bool = True
) -> Moments:
    """`measure` of what was checked; `wide_x` is `widened(x)`, along which x moves.

    A norm that measures x and normalizes it gives one `wide_x` to both: their cotangents meet in
    it, wide, and are rounded once. Rounding each takes 1.9 times as long on a CPU.
    """
    with jax.named_scope("normjax.measure"):
        count = _count(x, axes, mask)
        # Alone, a sum over what lies in one piece fuses into one pass with all that follows.
        fused = x.dtype not in _HALF and axes == tuple(range(1, x.ndim))[-len(axes) :]
        both = _jitted_mean_and_m2(x, wide_x, mask, or_one(count), axes, centered, fused)
        mean, m2 = (jnp.squeeze(v, axes) for v in both)
        if mask is not None:
            count = jnp.squeeze(count, axes)
            count = count.reshape(()) if count.size == 1 else jnp.broadcast_to(count, mean.shape)
        return Moments(count, mean, m2)


def merge(first: Moments, *others: Moments) -> Moments:
    """Merges moments of pieces of data into the moments of all of it.

        count = sum of counts,   mean = sum of count_i mean_i / count,
        m2 = sum of m2_i + count_i |mean_i - mean|^2

    Args:
        first, others: moments over equal features.

    Returns:
        `Moments` of the concatenated data.

    Guarantees:
        monoid: associative and commutative to rounding; moments with count 0 change nothing.

    Raises:
        ValueError: the moments are of unequal features.

    References:
        Chan, Golub, LeVeque (1983), the pairwise merge, here for any number of pieces at once.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> a = normjax.measure(jnp.array([1.0, 2.0]), axis=0)
        >>> b = normjax.measure(jnp.array([6.0]), axis=0)
        >>> normjax.merge(a, b).mean
        Array(3., dtype=float32)
    """
    called = "normjax.merge"
    pieces = (first, *others)
    features = _checks.features(called, [jnp.shape(m.mean) for m in pieces])
    # A count shared by all features stays one number if all pieces have such a count.
    counted = _checks.features(called, [jnp.shape(m.count) for m in pieces])
    count = _stack([m.count for m in pieces], counted or (1,) * len(features))
    mean = _stack([m.mean for m in pieces], features)
    m2 = _stack([m.m2 for m in pieces], features)
    pooled = collapse(Moments(count, mean, m2))
    return pooled._replace(count=pooled.count.reshape(counted))


def collapse(stacked: Moments) -> Moments:
    """Merges moments that are stacked along their first axis; a single count is that of each."""
    pieces, *features = stacked.mean.shape
    single = np.ndim(stacked.count) == 0
    count = stacked.count
    if single:
        count = jnp.full((pieces, *(1 for _ in features)), count)
    total = partial(jax.tree.map, partial(jnp.sum, axis=0, keepdims=True))
    pooled = _pool(stacked._replace(count=count), total)
    count, mean, m2 = (jnp.squeeze(leaf, axis=0) for leaf in pooled)
    return Moments(count.reshape(()) if single else count, mean, m2)


def synchronize(
    moments: Moments,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Merges the moments of all devices along `axis_name` into the moments of the whole batch.

    The formula is that of `merge`, its sums taken over the named axis: two small reductions, the
    second one around the mean that the first one found, and one of two vectors for the gradient.
    One reduction would have to sum around a pivot that the devices agree on before they have
    spoken, and nothing bounds how far that is from the mean: the variance would be a difference of
    large numbers again. What the second one costs is measured in docs/devices.md.

    Args:
        moments: what this device measured.
        axis_name: one name or several, bound by `pmap`, `shard_map` or `vmap`.
        axis_index_groups: device groups that share among themselves only, as in `jax.lax.psum`.

    Returns:
        `Moments`, equal on all devices (of a group).

    Guarantees:
        shared exactly: equal to measuring the concatenated batch, in value and gradient, for any
            counts, a device without a valid entry included.

    Raises:
        NameError: `axis_name` is not bound.
        ValueError: `axis_index_groups` do not name each device once.
        NotImplementedError: `axis_index_groups` where JAX has none: under `vmap`, and of unequal
            size under `shard_map` with `check_vma=True`.

    References:
        Chan, Golub, LeVeque (1983), the pairwise merge, over all devices at once.

    Example:
        >>> import jax, jax.numpy as jnp, normjax
        >>> def share(x):
        ...     return normjax.synchronize(normjax.measure(x, axis=0), "batch").mean
        >>> jax.vmap(share, axis_name="batch")(jnp.array([[1.0, 3.0], [5.0, 7.0]]))
        Array([4., 4.], dtype=float32)
    """
    called = "normjax.synchronize"
    _checks.axis_size(called, axis_name, axis_index_groups)
    where: dict[str, Any] = dict(axis_name=axis_name, axis_index_groups=axis_index_groups)
    if axis_index_groups is not None:
        # psum multiplies a constant by the size of the first group, whatever that of the others.
        moments = moments._replace(count=jnp.full_like(moments.m2, moments.count))
    with jax.named_scope(called), _checks.grouped(called, axis_name, axis_index_groups):
        try:
            return _pool(moments, partial(lax.psum, **where))
        except NotImplementedError:
            # shard_map with check_vma=True cannot sum over groups. It gathers over equal ones.
            if len(set(map(len, axis_index_groups or ()))) != 1:
                raise
            return collapse(lax.all_gather(moments, **where))


def _pool(moments: Moments, total: Callable) -> Moments:
    """The one merge formula; `total` says what is summed over: pieces, devices, steps."""
    count, mean, m2 = moments
    pooled_count = total(count)
    entries = or_one(pooled_count)
    divisor = entries.astype(mean.dtype)
    # An empty whole has mean 0: its weighted sum is 0 already.
    rough = moments_of_norm(total(_scaled(mean, count)) / divisor)
    # Corrected as in `measure`, so that pieces of one constant merge into that constant. The
    # correction is zero but for rounding, and so is its derivative.
    off = lax.stop_gradient(_scaled(mean - rough, count))
    # Two sums, which XLA makes one: JAX 0.7 cannot transpose one of which a part is constant.
    lost, squares = total(off), total(m2 + _between(count, mean, rough))
    rest = lost / divisor
    squares = moments_of_norm(squares - _abs_square(rest) * entries)
    return Moments(pooled_count, rough + rest, jnp.maximum(squares, 0))


@jax.custom_jvp
def _between(count: Count, mean: Array, pooled_mean: Array) -> Array:
    """What a piece adds to m2 because its mean is not that of the whole."""
    return _abs_square(mean - pooled_mean) * count


@_between.defjvp
def _between_jvp(primals, tangents):
    # The term with d pooled_mean is missing because the pieces' deviations sum to zero. Autodiff
    # would find that zero by communicating it: one more reduction over the devices.
    count, mean, pooled_mean = primals
    slope = 2 * jnp.asarray(count).astype(mean.dtype) * jnp.conj(mean - pooled_mean)
    return _between(*primals), jnp.real(slope * tangents[1])


def _count(x: Array, axes: tuple[int, ...], mask: Array | None) -> Count:
    """How many entries count, rank kept where there is a mask."""
    dtype = jnp.finfo(wide(x.dtype)).dtype
    if mask is None:
        # A NumPy constant: summing it over devices then costs no communication.
        entries = prod(x.shape[a] for a in axes)
        return dtype.type(entries) if isinstance(entries, int) else jnp.asarray(entries, dtype)
    repeats = prod(x.shape[a] for a in axes if mask.shape[a] == 1)
    # Counted in integers, since a float32 running sum of ones stops growing at 2^24.
    return jnp.sum(mask, axes, dtype=jnp.int32, keepdims=True).astype(dtype) * repeats


@partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _mean_and_m2(
    x: Array, wide_x: Array, mask: Array | None, divisor: Count, axes: tuple[int, ...],
    centered: bool, fused: bool,
) -> tuple[Array, Array]:  # fmt: skip
    # The corrected two-pass algorithm: sums around what a first sum found mend what that lost by
    # rounding. It makes constants exact, and no choice of data can break it, as one can break a
    # pivot that is taken from a part of x.
    dtype = wide(x.dtype)
    total = partial(summed, axes=axes)
    once = (x if fused else apart(x)).astype(dtype)
    if not centered:
        m2 = total(_abs_square(_admitted(once, mask)))
        return jnp.zeros_like(m2, dtype), m2
    rough = total(_admitted(once, mask)) / divisor.astype(dtype)
    half = x.dtype in _HALF
    # Half precision is spared one sum: rounded to the dtype of x, the pivot lies on one grid with
    # x, where (mean - pivot)^2 <= var, and a constant is its own pivot.
    info = jnp.finfo(x.dtype)
    pivot = lax.reduce_precision(rough, info.nexp, info.nmant) if half else rough
    walks = (x, pivot, x, pivot)
    first, center, second, middle = walks if fused else apart(walks)
    squares = total(_abs_square(_deviation(second.astype(dtype), middle, mask)))
    if half:
        rest = jnp.where(squares > 0, rough - pivot, jnp.zeros((), dtype))
    else:
        rest = total(_deviation(first.astype(dtype), center, mask)) / divisor.astype(dtype)
    return pivot + rest, jnp.maximum(squares - _abs_square(rest) * divisor, 0)


_jitted_mean_and_m2 = jax.jit(_mean_and_m2, static_argnums=(4, 5, 6), inline=True)


@_mean_and_m2.defjvp
def _mean_and_m2_jvp(axes, centered, _, primals, tangents):
    (x, _, mask, divisor), dx = primals, tangents[1]
    mean, m2 = moments_of_norm(_mean_and_m2(*primals, axes, centered, False))

    # d mean = sum(dx) / count and d m2 = 2 sum(Re(conj(x - mean) dx)). The term with d mean is
    # missing from d m2 because the deviations sum to zero. Around zero the mean is constant.
    def deviated(dx, mask, mean, x):
        mean, x = apart((mean, x), walk=3)
        return jnp.conj(_deviation(widened(x), mean, mask)) * _admitted(dx, mask)

    total, d_mean = partial(jnp.sum, axis=axes, keepdims=True), jnp.zeros_like(mean)
    if centered:
        d_mean = total(dx if mask is None else diagonal(_admitted, dx, mask))
        d_mean = d_mean / divisor.astype(mean.dtype)
    products = diagonal(deviated, dx, mask, mean if centered else None, x)
    return (mean, m2), (d_mean, 2 * total(jnp.real(products)))


def widened(x: Array) -> Array:
    """x as wide as its statistics."""
    return x.astype(wide(x.dtype))


def _admitted(x: Array, mask: Array | None) -> Array:
    """x, and 0 where the mask is False: selected, since 0 * NaN would still be NaN."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))


def _deviation(x: Array, center: Array | None, mask: Array | None) -> Array:
    """x - center, and 0 where the mask is False."""
    if center is None:
        return _admitted(x, mask)
    return (x if mask is None else jnp.where(mask, x, center)) - center


def or_one(count: Count) -> Count:
    """What to divide by: an empty sum is 0 already and stays so. A constant stays one."""
    where = np.where if isinstance(count, np.generic) else jnp.where
    return where(count > 0, count, np.ones((), count.dtype)).astype(count.dtype)


def _stack(leaves: Sequence[ArrayLike], shape: tuple[int, ...]) -> Array:
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    dtype = wide(*(a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.inexact)))
    return jnp.stack([jnp.broadcast_to(a.astype(dtype), shape) for a in arrays])


def wide(*dtypes: np.dtype) -> np.dtype:
    """Statistics are never narrower than float32; float64 and complex stay what they are."""
    # NumPy's lattice, since JAX's own refuses to answer under strict promotion.
    return reduce(np.promote_types, dtypes, np.dtype(np.float32))


def _scaled(mean: Array, count: Count) -> Array:
    return mean * jnp.asarray(count).astype(mean.dtype)


def _abs_square(x: Array) -> Array:
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
