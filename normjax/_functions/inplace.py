"""Batch norm and an elementwise activation in one; the backward pass keeps only the input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normjax import _errors
from normjax._core.normalize import Activation
from normjax._functions.batch import Arguments, run
from normjax._stats import Stats


@dataclass(frozen=True)
class LeakyReLU:
    """z = y for y >= 0, negative_slope * y below (Maas, Hannun, Ng 2013).

    Its derivative at 0 is 1, as that of `jax.nn.leaky_relu`.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.LeakyReLU(0.5)(jnp.array([-2.0, 2.0]))
        Array([-1.,  2.], dtype=float32)
    """

    negative_slope: float = 0.01

    @_errors.named("normjax.LeakyReLU")
    def __post_init__(self) -> None:
        _errors.slope("negative_slope", self.negative_slope)

    def __call__(self, y: Array) -> Array:
        """The activation."""
        return jnp.where(y >= 0, y, self.negative_slope * y)


@dataclass(frozen=True)
class ELU:
    """z = y for y > 0, alpha (exp(y) - 1) below (arXiv:1511.07289).

    Its derivative at 0 is alpha, as that of `jax.nn.elu`.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> normjax.ELU()(jnp.array([-1.0, 2.0])).round(2)
        Array([-0.63,  2.  ], dtype=float32)
    """

    alpha: float = 1.0

    @_errors.named("normjax.ELU")
    def __post_init__(self) -> None:
        _errors.slope("alpha", self.alpha)

    def __call__(self, y: Array) -> Array:
        """The activation."""
        # Two selections: exp overflows above 0, and jnp.minimum would halve the derivative at 0.
        below = jnp.where(y > 0, jnp.zeros((), y.dtype), y)
        return jnp.where(y > 0, y, self.alpha * jnp.expm1(below))


@_errors.named("normjax.batch_norm_act")
def batch_norm_act(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    train: bool,
    activation: Activation = LeakyReLU(),
    feature_axis: int | Collection[int] = -1,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    ddof: float = 0,
    debias: bool = False,
    mask: ArrayLike | None = None,
    virtual_batch_size: int | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Stats]:
    """Batch norm and an activation in one, for less memory: the backward pass keeps only `x`.

        z = activation(y),   y = (x - mean) / sqrt(var + epsilon) * scale + bias

    The derivative of the activation is recomputed from x. A separate activation after `batch_norm`
    would keep y, or a mask of its signs, in addition to x. z is rounded once to its dtype.

    Args:
        x: real floating array; everything else but `activation` as in `batch_norm`.
        stats, scale, bias, train, feature_axis, momentum, epsilon: as in `batch_norm`.
        ddof, debias, mask, virtual_batch_size: as in `batch_norm`.
        axis_name, axis_index_groups, dtype: as in `batch_norm`.
        activation: a hashable elementwise function of one array, for example
            `normjax.LeakyReLU()`, `normjax.ELU()` or `jax.nn.gelu`.

    Returns:
        `(z, stats)`, as in `batch_norm`.

    Guarantees:
        same result: z, stats and all derivatives are those of `batch_norm` and the activation
            after it, for any scale and bias.
        light backward: only `x` in its own dtype and per-feature vectors are kept.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as in `batch_norm`.
        TypeError: a complex `x`; an activation that is not a hashable function or does not map a
            number to a number.

    References:
        Rota Bulo, Porzi, Kontschieder (2018), In-Place Activated BatchNorm, arXiv:1712.02616. The
        paper keeps z and recomputes x, which is inexact where the activation saturates or scale is
        small compared with bias. Here x is kept and z is recomputed.

    Example:
        >>> import jax.numpy as jnp, normjax
        >>> x = jnp.array([[0.0], [4.0]])
        >>> z, stats = normjax.batch_norm_act(x, None, train=True, activation=normjax.ELU())
        >>> z.round(2).ravel()
        Array([-0.63,  1.  ], dtype=float32)
    """
    arguments = Arguments(
        x, stats, scale, bias, train, feature_axis, momentum, epsilon, ddof, debias, mask,
        axis_name, axis_index_groups, dtype, virtual_batch_size, activation,
    )  # fmt: skip
    z, moments = run(arguments)
    return z, arguments.moved(moments)
