"""The one way from x to y: measure, merge, normalize."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normjax import _errors
from normjax._core.dtypes import common_dtype, real_dtype
from normjax._core.measure import (
    Reduction,
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
    normalized,
    product,
    tangent,
)
from normjax._core.remat import input_of_norm, moments_of_norm


class Inputs(NamedTuple):
    """The arrays of a norm, all but x in the rank of x; None where there is none.

    Attributes:
        x: what is normalized.
        mask: boolean, True = counts.
        scale, bias: the affine map.
        epsilon: added to the variance.
        pivot: what the mean is likely near to: the running mean.
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
        """With an axis for the groups of neighbors along `axis`, before that of the neighbors."""

        def split(v: Array) -> Array:
            two = (1, 1) if v.shape[axis] == 1 else (groups, v.shape[axis] // groups)
            return v.reshape((*v.shape[:axis], *two, *v.shape[axis + 1 :]))

        arrays = self.x, self.mask, self.scale, self.bias, self.pivot
        x, mask, scale, bias, pivot = jax.tree.map(split, arrays)
        return Inputs(x, mask, scale, bias, self.epsilon, pivot)


class Options(NamedTuple):
    """What is static about a norm; equal ones share a trace.

    Attributes:
        reduction: what is measured.
        output: how y is returned.
        summed: divide by the root of the sum of squares instead of that of their mean.
        correction: gives (r, d) for moments and inputs; what is scaled and shifted is then
            r (x - mean) / deviation + d. Constants to every derivative.
    """

    reduction: Reduction
    output: Output
    summed: bool = False
    correction: Callable[[Moments, Inputs], tuple[Array, Array]] | None = None


def standardize(inputs: Inputs, options: Options) -> tuple[Array, Moments]:
    """y and the moments by which x was normalized. All is checked before."""
    how = options.reduction
    # Around the call: jax.vmap meets what it cannot share when the function has been traced.
    with _errors.grouped(how.axis_name, how.axis_index_groups):
        return _jitted(inputs, options)


@partial(jax.jit, static_argnums=1)
def _jitted(inputs: Inputs, options: Options) -> tuple[Array, Moments]:
    # A function of its own for checkpoint policies too: where the function that makes what a policy
    # keeps goes on to use it, JAX rounds it (reduce_precision), and XLA's CPU compiler then holds
    # x and the rounded x. A stack of convolutions took 1.4 times the memory.
    y, moments = standardized(inputs._replace(x=input_of_norm(inputs.x)), options)
    return y, squeezed(moments, options.reduction.axes)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardized(inputs: Inputs, options: Options) -> tuple[Array, Moments]:
    """`standardize` inside of a larger function; moments in the rank of x."""
    moments = _measured(inputs, options, kept=False)
    vectors, _ = _vectors(moments, inputs, options)
    return apply(inputs.x, inputs.mask, vectors, options.output), moments


@partial(standardized.defjvp, symbolic_zeros=True)
def _standardized_jvp(options: Options, primals: Any, tangents: Any) -> Any:
    # One rule for measuring and normalizing, in which dx is upcast once: the cotangents of both
    # meet in it and are rounded once. On a CPU, rounding each takes 1.9 times as long.
    (inputs,), (d_inputs,) = primals, tangents
    x, mask, *_ = inputs
    moments = moments_of_norm(_measured(inputs, options, kept=True))
    vectors, corrected = _vectors(moments, inputs, options)
    number = common_dtype(x, *vectors)
    dx, d_scale, d_bias, d_var = (
        v if v is None else v.astype(number)
        for v in map(given, (d_inputs.x, d_inputs.scale, d_inputs.bias, d_inputs.epsilon))
    )
    d_moments, d_mean = jax.tree.map(jnp.zeros_like, moments), None
    if dx is not None:
        d_mean, d_m2 = moments_tangent(x, mask, moments, dx, options.reduction)
        d_moments = Moments(d_moments.count, d_mean, d_m2)
        d_var = d_var if d_var is None else d_var.real
        d_var = added(_spread(d_moments._replace(count=moments.count), options), d_var)
        d_mean = d_mean if options.reduction.centered else None
    d_vectors = Vectors(d_mean, d_var, *corrected(d_scale, d_bias))
    own, _ = _vectors(moments_for_output(x, mask, moments, options.reduction), inputs, options)
    y = normalized(x, mask, own, options.output)
    return (y, moments), (tangent(x, mask, vectors, dx, d_vectors, options.output), d_moments)


def _measured(inputs: Inputs, options: Options, kept: bool) -> Moments:
    epsilon = jnp.asarray(inputs.epsilon, real_dtype(common_dtype(inputs.x)))
    floor = lax.stop_gradient(epsilon)
    return shared_moments(inputs.x, inputs.mask, inputs.pivot, floor, options.reduction, kept)


def _spread(moments: Moments, options: Options) -> Array:
    """What the deviations are divided by the root of; linear in m2."""
    return moments.m2 if options.summed else moments.variance()


def _vectors(moments: Moments, inputs: Inputs, options: Options) -> tuple[Vectors, Any]:
    """By what x is normalized, and the linear map that gives scale and bias, for tangents too."""
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
