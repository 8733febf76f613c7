"""Standardization, which all norms use: measure, merge, normalize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normjax import _errors
from normjax._core.dtypes import accumulation_dtype, common_dtype, real_dtype
from normjax._core.linear import norm_tangent
from normjax._core.lowering import KERNELS
from normjax._core.measure import (
    Reduction,
    chosen,
    moments_for_output,
    moments_tangent,
    shared_moments,
    squeezed,
)
from normjax._core.moments import Moments
from normjax._core.normalize import (
    Output,
    Vectors,
    added,
    apply,
    given,
    inverse,
    normalized,
    product,
    tangent,
)
from normjax._core.platforms import kernels
from normjax._core.remat import input_of_norm, moments_of_norm


class Inputs(NamedTuple):
    """The arrays of a norm, all but x in the rank of x; None where there is none.

    Attributes:
        x: the input.
        mask: boolean, True = counts.
        scale, bias: the affine map.
        epsilon: added to the variance.
        pivot: an estimate of the mean: the running mean.
        other: arrays for `Options.correction`.
    """

    x: Array
    mask: Any = None
    scale: Array | None = None
    bias: Array | None = None
    epsilon: ArrayLike = 0.0
    pivot: Array | None = None
    other: Any = None

    def split(self, axis: int, groups: int) -> Inputs:
        """Splits `axis` into an axis of groups and an axis of the neighbors in a group."""

        def split(v: Array) -> Array:
            two = (1, 1) if v.shape[axis] == 1 else (groups, v.shape[axis] // groups)
            return v.reshape((*v.shape[:axis], *two, *v.shape[axis + 1 :]))

        arrays = self.x, self.mask, self.scale, self.bias, self.pivot
        x, mask, scale, bias, pivot = jax.tree.map(split, arrays)
        return Inputs(x, mask, scale, bias, self.epsilon, pivot)


class Options(NamedTuple):
    """The static options of a norm; equal ones share a trace.

    Attributes:
        reduction: what the statistics are reduced over.
        output: dtype and activation of y.
        summed: divide by the root of the sum of squares instead of that of their mean.
        correction: returns (r, d) for moments and inputs; r (x - mean) / deviation + d is then
            scaled and shifted. Derivatives treat r and d as constants.
    """

    reduction: Reduction
    output: Output
    summed: bool = False
    correction: Callable[[Moments, Inputs], tuple[Array, Array]] | None = None


def standardize(inputs: Inputs, options: Options) -> tuple[Array, Moments]:
    """y and the moments by which x was normalized. The caller has checked all arguments."""
    how = options.reduction
    # Around the call, since jax.vmap raises only after the function was traced.
    with _errors.grouped(how.axis_name, how.axis_index_groups):
        return _jitted(inputs, options)


@partial(jax.jit, static_argnums=1)
def _jitted(inputs: Inputs, options: Options) -> tuple[Array, Moments]:
    # A separate function, also for checkpoint policies: if the function that computes a saved value
    # also uses it, JAX rounds the value (reduce_precision), and XLA's CPU compiler then holds both
    # x and the rounded x. A stack of convolutions took 1.4 times the memory.
    y, moments = standardized(inputs._replace(x=input_of_norm(inputs.x)), options)
    return y, squeezed(moments, options.reduction.axes)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def standardized(inputs: Inputs, options: Options, kept: bool = False) -> tuple[Array, Moments]:
    """`standardize` inside of a larger function; moments in the rank of x.

    `kept` says that a derivative reads the moments again.
    """
    how = _kernel(inputs, options)
    if how is not None and how.normalizes:
        return _by_kernel(inputs, options, how, kept)
    return _composed(inputs, options, kept)


def _composed(inputs: Inputs, options: Options, kept: bool) -> tuple[Array, Moments]:
    """Measures, then normalizes."""
    moments = _measured(inputs, options, kept)
    if not kept:
        vectors, _ = _vectors(moments, inputs, options)
        return apply(inputs.x, inputs.mask, vectors, options.output), moments
    moments = moments_of_norm(moments)
    own = moments_for_output(inputs.x, inputs.mask, moments, options.reduction)
    vectors, _ = _vectors(own, inputs, options)
    return normalized(inputs.x, inputs.mask, vectors, options.output), moments


@partial(standardized.defjvp, symbolic_zeros=True)
def _standardized_jvp(options: Options, _: bool, primals: Any, tangents: Any) -> Any:
    (inputs,), (d_inputs,) = primals, tangents
    how = _kernel(inputs, options)
    if how is None or not how.normalizes:
        y, moments = _composed(inputs, options, True)
    else:
        y, moments = standardized(inputs, options, True)
        moments = moments_of_norm(moments)
    dx, *d_affine = map(given, (d_inputs.x, d_inputs.scale, d_inputs.bias, d_inputs.epsilon))
    if how is not None and dx is not None and d_affine[-1] is None:
        dy = _tangent_by_kernel(inputs, moments, options, how, dx, *d_affine[:2])
        dx = dx.astype(common_dtype(inputs.x))
        d_mean, d_m2 = moments_tangent(inputs.x, inputs.mask, moments, dx, options.reduction)
        d_moments = Moments(jnp.zeros_like(moments.count), d_mean, d_m2)
    else:
        dy, d_moments = _tangent(inputs, moments, options, dx, *d_affine)
    return (y, moments), (dy, d_moments)


def _tangent(
    inputs: Inputs, moments: Moments, options: Options,
    dx: Array | None, d_scale: Array | None, d_bias: Array | None, d_var: Array | None,
) -> tuple[Array, Moments]:  # fmt: skip
    """dy and the tangents of the moments.

    One rule for measuring and normalizing, in which dx is upcast once, so that the cotangents of
    both are added before they are rounded. On a CPU, rounding each takes 1.9 times as long.
    """
    x, mask, *_ = inputs
    vectors, corrected = _vectors(moments, inputs, options)
    number = common_dtype(x, *vectors)
    dx, d_scale, d_bias, d_var = (
        v if v is None else v.astype(number) for v in (dx, d_scale, d_bias, d_var)
    )
    d_moments, d_mean = jax.tree.map(jnp.zeros_like, moments), None
    if dx is not None:
        d_mean, d_m2 = moments_tangent(x, mask, moments, dx, options.reduction)
        d_moments = Moments(d_moments.count, d_mean, d_m2)
        d_var = d_var if d_var is None else d_var.real
        d_var = added(_spread(d_moments._replace(count=moments.count), options), d_var)
        d_mean = d_mean if options.reduction.centered else None
    d_vectors = Vectors(d_mean, d_var, *corrected(d_scale, d_bias))
    return tangent(x, mask, vectors, dx, d_vectors, options.output), d_moments


def _kernel(inputs: Inputs, options: Options) -> kernels.View | None:
    """How the CPU kernels view x; None if there is no kernel for this norm."""
    x, where = inputs.x, options.reduction
    local = inputs.mask is None and options.correction is None and where.axis_name is None
    if not local or x.dtype not in kernels.DTYPES or options.output != Output(x.dtype):
        return None
    if any(jax.typeof(x).sharding.spec) or kernels.plugin() is None:
        return None
    how = kernels.view(x.shape, where.axes, where.groups, where.centered, options.summed)
    if how is None:
        return None
    rows = isinstance(how, kernels.Rows)
    features = where.axes if rows else tuple(range(where.axes[-1] + 1, x.ndim))
    shape = tuple(n if a in features else 1 for a, n in enumerate(x.shape))
    affine = [v for v in (inputs.scale, inputs.bias) if v is not None]
    one_dtype = common_dtype(x, *affine) == accumulation_dtype(x.dtype)
    return how if one_dtype and all(v.shape == shape for v in affine) else None


def _by_kernel(
    inputs: Inputs, options: Options, how: kernels.View, kept: bool
) -> tuple[Array, Moments]:
    """`_composed`, in one kernel where kernels may be called."""
    kind = jax.typeof(inputs.x).update(weak_type=False)
    shape = tuple(1 if a in options.reduction.axes else n for a, n in enumerate(kind.shape))
    one = kind.update(shape=shape, dtype=accumulation_dtype(kind.dtype))

    def form(platform: str, inputs: Inputs) -> list[Array]:
        if platform != KERNELS:
            y, moments = _composed(inputs, options, kept)
            return [y, moments.mean, moments.m2]
        x, _, scale, bias, epsilon, *_ = inputs
        y, *both = kernels.forward(how, x, scale, bias, jnp.asarray(epsilon))
        return [y, *(v.reshape(shape) for v in both)]

    inputs = _with_epsilon(inputs)
    y, mean, m2 = chosen(form, (inputs,), types=(kind, one, one))
    return y, Moments(options.reduction.entries(inputs.x), mean, m2)


def _tangent_by_kernel(
    inputs: Inputs, moments: Moments, options: Options, how: kernels.View,
    dx: Array, d_scale: Array | None, d_bias: Array | None,
) -> Array:  # fmt: skip
    """dy of `_tangent`, as one map whose transpose is one kernel where kernels may be called."""
    terms, structure = jax.tree.flatten((dx, d_scale, d_bias))
    inputs = _with_epsilon(inputs._replace(bias=None, pivot=None))
    kept, own = jax.tree.flatten((inputs, moments.mean, moments.m2))
    count, number = options.reduction.entries(inputs.x), len(terms)

    def given(kept: Sequence[Array]) -> tuple[Inputs, Moments]:
        inputs, *both = jax.tree.unflatten(own, kept)
        return inputs, Moments(count, *both)

    def plain(*operands: Array) -> Array:
        dx, d_scale, d_bias = jax.tree.unflatten(structure, operands[:number])
        inputs, moments = given(operands[number:])
        return _tangent(inputs, moments, options, dx, d_scale, d_bias, None)[0]

    def kernel(dy: Array, *kept: Array) -> list[Array]:
        inputs, moments = given(kept)
        vectors, _ = _vectors(moments, inputs, options)
        each = moments.mean, inverse(vectors, vectors.var.dtype)
        dx, *sums = kernels.backward(how, dy, inputs.x, *each, inputs.scale, affine=number > 1)
        wanted = [v for v, t in zip(sums, (d_scale, d_bias), strict=False) if t is not None]
        return [
            v.reshape(t.shape).astype(t.dtype) for v, t in zip((dx, *wanted), terms, strict=True)
        ]

    return norm_tangent(plain, terms, kept, kernel)


def _with_epsilon(inputs: Inputs) -> Inputs:
    """epsilon as an array, since a kernel reads it."""
    dtype = real_dtype(accumulation_dtype(inputs.x.dtype))
    return inputs._replace(epsilon=jnp.asarray(inputs.epsilon, dtype))


def _measured(inputs: Inputs, options: Options, kept: bool) -> Moments:
    epsilon = jnp.asarray(inputs.epsilon, real_dtype(common_dtype(inputs.x)))
    floor = lax.stop_gradient(epsilon)
    return shared_moments(inputs.x, inputs.mask, inputs.pivot, floor, options.reduction, kept)


def _spread(moments: Moments, options: Options) -> Array:
    """The square of the divisor of the deviations; linear in m2."""
    return moments.m2 if options.summed else moments.variance()


def _vectors(moments: Moments, inputs: Inputs, options: Options) -> tuple[Vectors, Any]:
    """The vectors that normalize x, and the linear map that corrects scale and bias."""
    mean = moments.mean if options.reduction.centered else None
    scale, bias = inputs.scale, inputs.bias

    def corrected(scale: Any, bias: Any) -> tuple[Any, Any]:
        return scale, bias

    if options.correction is not None:
        r, d = lax.stop_gradient(options.correction(moments, inputs))
        number = common_dtype(inputs.x, r, scale, bias)
        r, d = r.astype(number), d.astype(number)
        scale = jnp.ones((1,) * r.ndim, number) if scale is None else scale.astype(number)
        bias = bias if bias is None else bias.astype(number)

        def corrected(scale: Any, bias: Any) -> tuple[Any, Any]:
            return product(scale, r), added(product(scale, d), bias)

    scale, bias = corrected(scale, bias)
    spread = _spread(moments, options)
    vectors = Vectors.make(inputs.x.dtype, mean, spread, scale, bias, inputs.epsilon)
    return vectors, corrected
