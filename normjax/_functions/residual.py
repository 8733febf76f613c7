"""A residual sum and its norm in one function."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._functions.layer import layer_norm, rms_norm


@_errors.named("normjax.add_layer_norm")
def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Collection[int] = -1,
    feature_axis: int | Collection[int] | None = None,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """Adds a residual and normalizes the sum; returns both, in one compiled pass.

        s = x + residual,   y = layer_norm(s, scale, bias)

    Args:
        x, residual: floating or complex arrays of one shape and dtype.
        scale, bias, axis, feature_axis, epsilon, mask, axis_name, axis_index_groups, dtype: as in
            `layer_norm`.

    Returns:
        `(y, s)`: the normalized sum, and the sum, which the next block adds to.

    Guarantees:
        light backward: only the sum and one vector for each axis are kept.

    Raises:
        TypeError: unequal dtypes; and as in `layer_norm`.
        ValueError: unequal shapes; and as in `layer_norm`.

    References:
        Ba, Kiros, Hinton (2016), arXiv:1607.06450; Xiong et al. (2020), arXiv:2002.04745.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> y, s = normjax.add_layer_norm(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
        >>> s
        Array([1., 3.], dtype=float32)
    """
    x, residual = _errors.same_shape_and_dtype(x, residual)
    total = x + residual
    y = layer_norm(
        total, scale, bias, axis=axis, feature_axis=feature_axis, epsilon=epsilon, mask=mask,
        axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype,
    )  # fmt: skip
    return y, total


@_errors.named("normjax.add_rms_norm")
def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int | Collection[int] = -1,
    feature_axis: int | Collection[int] | None = None,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """Adds a residual and normalizes the sum; returns both, in one compiled pass.

        s = x + residual,   y = rms_norm(s, scale)

    Args:
        x, residual: floating or complex arrays of one shape and dtype.
        scale, axis, feature_axis, epsilon, mask, axis_name, axis_index_groups, dtype: as in
            `rms_norm`.

    Returns:
        `(y, s)`: the normalized sum, and the sum, which the next block adds to.

    Guarantees:
        light backward: only the sum and one vector for each axis are kept.

    Raises:
        TypeError: unequal dtypes; and as in `rms_norm`.
        ValueError: unequal shapes; and as in `rms_norm`.

    References:
        Zhang, Sennrich (2019), arXiv:1910.07467.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> y, s = normjax.add_rms_norm(jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]))
        >>> s
        Array([3., 4.], dtype=float32)
    """
    x, residual = _errors.same_shape_and_dtype(x, residual)
    total = x + residual
    y = rms_norm(
        total, scale, axis=axis, feature_axis=feature_axis, epsilon=epsilon, mask=mask,
        axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype,
    )  # fmt: skip
    return y, total
