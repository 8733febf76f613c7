"""Measures moments: on one device in the platform's form, over devices with one reduction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from normjax import _errors
from normjax._core.algorithms import (
    around_or_two_pass,
    around_pivot_is_exact,
    moved,
    sums_around,
    two_pass,
    unless_far,
)
from normjax._core.devices import AxisName, Groups, agreed, fingerprint, total_over_devices, varies
from normjax._core.dtypes import abs_square, accumulation_dtype, upcast
from normjax._core.linear import diagonal
from normjax._core.lowering import CPU, by_platform
from normjax._core.mask import Count, counted, deviation, product_of_sizes, safe_count, select
from normjax._core.moments import Moments, collapse, synchronized
from normjax._core.platforms import PLATFORMS, gpu, tpu
from normjax._core.remat import moments_of_norm


class FeatureGroups(NamedTuple):
    """Groups of neighboring features along `axis`; each group shares its statistics."""

    axis: int
    groups: int

    def stacked(self, v: Array) -> Array:
        """The features of a group along a new first axis."""
        sizes = (self.groups, v.shape[self.axis] // self.groups)
        split = v.reshape(*v.shape[: self.axis], *sizes, *v.shape[self.axis + 1 :])
        return jnp.moveaxis(split, self.axis + 1, 0)

    def spread(self, v: Array, features: int) -> Array:
        """Repeats the value of a group for each of its features."""
        # jnp.repeat would need an output sharding for explicitly sharded features.
        sizes = (self.groups, features // self.groups)
        head, tail = v.shape[: self.axis], v.shape[self.axis + 1 :]
        whole = jnp.broadcast_to(jnp.expand_dims(v, self.axis + 1), (*head, *sizes, *tail))
        return whole.reshape(*head, features, *tail)

    def total(self, v: Array) -> Array:
        """For each feature the sum over its group."""
        return self.spread(jnp.sum(self.stacked(v), axis=0), v.shape[self.axis])

    def pooled_count(self, count: Count, features: int) -> Count:
        """How many entries the group of each feature has."""
        if np.ndim(count) == 0:
            return count * product_of_sizes([features // self.groups], count.dtype)
        shape = [features if a == self.axis else n for a, n in enumerate(count.shape)]
        return self.total(jnp.broadcast_to(count, shape))

    def merge(self, moments: Moments) -> tuple[Array, Array]:
        """For each feature mean and m2 of its group."""
        count, mean, m2 = moments
        features = mean.shape[self.axis]
        if np.ndim(count):
            count = self.stacked(jnp.broadcast_to(count, mean.shape))
        _, mean, m2 = collapse(Moments(count, self.stacked(mean), self.stacked(m2)))
        return self.spread(mean, features), self.spread(m2, features)


class Reduction(NamedTuple):
    """What statistics are reduced over.

    Attributes:
        axes: of x, sorted.
        centered: around the mean, or around zero.
        axis_name, axis_index_groups: the devices that share statistics.
        groups: the features that share statistics.
    """

    axes: tuple[int, ...]
    centered: bool = True
    axis_name: AxisName | None = None
    axis_index_groups: Groups = None
    groups: FeatureGroups | None = None

    def hashable(self) -> Reduction:
        """With tuples in place of lists."""
        name, groups = self.axis_name, self.axis_index_groups
        return self._replace(
            axis_name=tuple(name) if isinstance(name, list) else name,
            axis_index_groups=None if groups is None else tuple(map(tuple, groups)),
        )

    def entries(self, x: Array) -> Count:
        """How many entries of x share statistics, on this device and without a mask."""
        count = counted(x, None, self.axes)
        if self.groups is None:
            return count
        return self.groups.pooled_count(count, x.shape[self.groups.axis])

    def total(self, sums: list[Array]) -> list[Array]:
        """Extends sums over the axes to all features and devices that share statistics."""
        if self.groups is not None:
            sums = [self.groups.total(v) for v in sums]
        if self.axis_name is not None:
            sums = total_over_devices(sums, self.axis_name, self.axis_index_groups)
        return sums


@_errors.named("normjax.measure")
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
        light backward: only `x` in its own dtype and vectors are kept.

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
    x = _errors.inexact("x", x)
    axes = _errors.axes("axis", axis, x.shape)
    centered = _errors.switch("centered", centered)
    mask = _errors.mask(mask, x.shape)
    with jax.named_scope("normjax.measure"):
        count = counted(x, mask, axes)
        both = _jitted_local(x, mask, count, axes, centered, False)
        return squeezed(Moments(count, *both), axes)


def squeezed(moments: Moments, axes: tuple[int, ...]) -> Moments:
    """Without the reduced axes; a count that all features share is one number."""
    count, mean, m2 = moments
    mean, m2 = (jnp.squeeze(v, axes) for v in (mean, m2))
    if np.ndim(count):
        count = jnp.squeeze(count, axes)
        count = count.reshape(()) if count.size == 1 else jnp.broadcast_to(count, mean.shape)
    return Moments(count, mean, m2)


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def shared_moments(
    x: Array, mask: Array | None, pivot: Array | None, floor: Array, reduction: Reduction,
    kept: bool,
) -> Moments:  # fmt: skip
    """Moments over all features and devices that share them, in the rank of x.

    Args:
        pivot: an estimate of the mean, in the rank of x: the running mean.
        floor: will be added to the variance, so smaller errors of sums around a pivot are allowed.
        kept: whether a derivative reads the moments again.
    """
    axes, name = reduction.axes, reduction.axis_name
    count = counted(x, mask, axes)
    if pivot is not None:
        pivot = lax.stop_gradient(pivot).astype(accumulation_dtype(x.dtype))
        if name is None:
            given = x, mask, count, pivot, floor
            return Moments(count, *chosen(partial(_around, axes=axes, kept=kept), given))
        if reduction.axis_index_groups is None and not varies(pivot, name):
            return _shared_around(x, mask, count, pivot, floor, reduction, kept)
    if reduction.groups is None:
        moments = Moments(count, *_local(x, mask, count, axes, reduction.centered, kept))
    else:
        form = partial(_of_groups, axes=axes, groups=reduction.groups, kept=kept)
        both = chosen(form, (x, mask, count, lax.stop_gradient(floor)))
        moments = Moments(
            reduction.groups.pooled_count(count, x.shape[reduction.groups.axis]), *both
        )
    if name is not None:
        moments = synchronized(moments, name, reduction.axis_index_groups)
    return moments


@shared_moments.defjvp
def _shared_moments_jvp(reduction: Reduction, _: bool, primals: Any, tangents: Any) -> Any:
    x, mask, *_ = primals
    moments = shared_moments(*primals, reduction, True)
    d_mean, d_m2 = moments_tangent(x, mask, moments, upcast(tangents[0]), reduction)
    return moments, Moments(jnp.zeros_like(moments.count), d_mean, d_m2)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def moments_for_output(
    x: Array, mask: Array | None, moments: Moments, reduction: Reduction
) -> Moments:
    """Moments that normalize y where a derivative reads `moments`: equal to them up to rounding.

    On a GPU the kernel that normalizes rows also measures them, at no cost. The moments that a
    derivative reads are computed in the backward pass, together with its sums. So 7 tensors are
    read and written instead of 8.
    """
    local = reduction.axis_name is None and reduction.groups is None
    if not local or not gpu.are_rows(x, reduction.axes):
        return moments
    count, *both = moments

    def form(platform: str, x: Array, mask: Any, count: Count, *both: Array) -> Sequence[Array]:
        if platform != "gpu":
            return both
        axes, centered = reduction.axes, reduction.centered
        return gpu.measure(x, mask, count, axes=axes, centered=centered, kept=False)

    return Moments(count, *chosen(form, (x, mask, count, *both)))


@moments_for_output.defjvp
def _moments_for_output_jvp(reduction: Reduction, primals: Any, tangents: Any) -> Any:
    return moments_for_output(*primals, reduction), tangents[2]


def moments_tangent(
    x: Array, mask: Array | None, moments: Moments, dx: Array, reduction: Reduction
) -> tuple[Array, Array]:
    """d mean and d m2, linear in dx, for moments over all features and devices that share them.

        d mean = sum(dx) / count,   d m2 = 2 sum(Re(conj(x - mean) dx))

    The term with d mean is missing from d m2 because the deviations sum to zero. Around zero the
    mean is constant.
    """
    mean, axes = moments.mean, reduction.axes

    def deviated(dx: Array, mask: Any, mean: Any, x: Array) -> Array:
        return jnp.conj(deviation(upcast(x), mean, mask)) * select(dx, mask)

    total = partial(jnp.sum, axis=axes, keepdims=True)
    products = diagonal(deviated, dx, mask, mean if reduction.centered else None, x)
    sums = [total(jnp.real(products))]
    if reduction.centered:
        sums.append(total(dx if mask is None else diagonal(select, dx, mask)))
    second, *first = reduction.total(sums)
    if not first:
        return jnp.zeros_like(mean), 2 * second
    return first[0] / safe_count(moments.count).astype(mean.dtype), 2 * second


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _local(
    x: Array, mask: Array | None, count: Count, axes: tuple[int, ...], centered: bool, kept: bool
) -> tuple[Array, Array]:
    """mean and m2 of the entries on this device."""
    form = partial(_measured, axes=axes, centered=centered, kept=kept)
    mean, m2 = chosen(form, (x, mask, count))
    return mean, m2


_jitted_local = jax.jit(_local, static_argnums=(3, 4, 5), inline=True)


@_local.defjvp
def _local_jvp(axes: Any, centered: bool, _: bool, primals: Any, tangents: Any) -> Any:
    x, mask, count = primals
    mean, m2 = moments_of_norm(_local(*primals, axes, centered, True))
    reduction = Reduction(axes, centered)
    moments = Moments(count, mean, m2)
    return (mean, m2), moments_tangent(x, mask, moments, upcast(tangents[0]), reduction)


def _shared_around(
    x: Array, mask: Array | None, count: Count, pivot: Array, floor: Array, reduction: Reduction,
    kept: bool,
) -> Moments:  # fmt: skip
    """One reduction over devices: the pivot is known before any communication.

    If the pivot is far from the mean, or not equal on all devices, the devices measure again and
    reduce means before squares. They all decide the same, from reduced values only.
    """
    axes, name = reduction.axes, reduction.axis_name
    assert name is not None
    sums = chosen(partial(_sums, axes=axes, kept=kept), (x, mask, count, pivot))
    # The types of pmap, vmap and shard_map with check_vma=False do not say whether the pivot
    # varies, so a hash of it is compared. A constant count is multiplied, not communicated.
    unknown = None if varies(x, name) else fingerprint(pivot)
    given = None if isinstance(count, np.generic) else count
    given, (first, second), same = total_over_devices((given, sums, unknown), name)
    whole = lax.psum(count, name) if given is None else given
    mean, m2 = moved(first, second, pivot, whole)
    exact = around_pivot_is_exact(mean, m2, pivot, whole, floor)
    if same is not None:
        exact = exact & agreed(same, lax.psum(1, name))

    def again() -> tuple[Array, Array]:
        own = Moments(count, *two_pass(x, mask, count, axes))
        return synchronized(own, name)[1:]

    return Moments(whole, *lax.cond(exact, lambda: (mean, m2), again))


def chosen(form: Any, operands: Any, types: Any = None) -> list[Array]:
    """`by_platform` for a tree of operands. Constants, such as a count, stay constants."""
    leaves, structure = jax.tree.flatten(operands)
    arrays = [v for v in leaves if not isinstance(v, np.generic)]

    def flat(platform: str, *arrays: Array) -> Sequence[Array]:
        given = iter(arrays)
        whole = [v if isinstance(v, np.generic) else next(given) for v in constants]
        return form(platform, *jax.tree.unflatten(structure, whole))

    # Without the arrays, which would leak from their trace.
    constants = [v if isinstance(v, np.generic) else None for v in leaves]
    return by_platform(flat, *arrays, types=types)


def _measured(platform: str, x: Array, mask: Any, count: Count, **how: Any) -> Any:
    return PLATFORMS[platform].measure(x, mask, count, **how)


def _of_groups(
    platform: str, x: Array, mask: Any, count: Count, floor: Array, *, axes: tuple[int, ...],
    groups: FeatureGroups, kept: bool,
) -> Any:  # fmt: skip
    """Measures each feature, then merges over the features of a group.

    Sums over a few neighboring features are slow, and so is a reshape of x.
    """

    def merged(x: Array, mask: Any, count: Count) -> tuple[Array, Array]:
        form = PLATFORMS[platform].measure
        both = form(x, mask, count, axes=axes, centered=True, kept=kept)
        return groups.merge(Moments(count, *both))

    if platform != "tpu" or jnp.iscomplexobj(x):
        return merged(x, mask, count)
    # Plain sums fuse into the convolution that makes x; a merge does not. The means of its channels
    # are small compared with the deviation of a group.
    whole = groups.pooled_count(count, x.shape[groups.axis])
    first, second = (groups.total(v) for v in sums_around(x, mask, None, axes, tpu.totals))
    near = moved(first, second, 0.0, whole)
    return unless_far(near, 0.0, whole, floor, merged, (x, mask, count))


def _around(
    platform: str, x: Array, mask: Any, count: Count, pivot: Array, floor: Array, *,
    axes: tuple[int, ...], kept: bool,
) -> Any:  # fmt: skip
    """One pass around the pivot where that is cheaper; measures again if the pivot is far off."""
    if platform in CPU:
        form = PLATFORMS[platform].measure
        return form(x, mask, count, axes=axes, centered=True, kept=kept)
    sums = sums_around(x, mask, pivot, axes, PLATFORMS[platform].totals)
    return around_or_two_pass(sums, x, mask, pivot, count, floor, axes)


def _sums(
    platform: str, x: Array, mask: Any, count: Count, pivot: Array, *, axes: tuple[int, ...],
    kept: bool,
) -> Any:  # fmt: skip
    """The sums around a pivot, in the form of the platform; on a CPU from exact moments."""
    if platform in CPU:
        form = PLATFORMS[platform].measure
        mean, m2 = form(x, mask, count, axes=axes, centered=True, kept=kept)
        shift = mean - pivot
        return shift * jnp.asarray(count).astype(shift.dtype), m2 + abs_square(shift) * count
    return sums_around(x, mask, pivot, axes, PLATFORMS[platform].totals)
