"""Names of the inputs and the moments of norms, for checkpoint policies."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_INPUT, _MOMENTS = "normjax.input", "normjax.moments"

_named = jax.checkpoint_policies.save_only_these_names(_INPUT, _MOMENTS)


def norm_inputs_saveable(primitive: Any, *values: Any, **params: Any) -> Any:
    """A policy for `jax.checkpoint` and `nn.remat`: keeps the inputs of norms and their moments.

        nn.remat(Block, policy=normjax.norm_inputs_saveable)

    In a block of convolution, norm and activation, the output of the convolution is kept. The
    backward pass recomputes only elementwise operations, the norm and the activation; it computes
    no convolution and no statistics again. It works for any activation and any norm of this
    library. Use it if activations fill the memory.

    Args:
        primitive, values, params: the arguments that JAX passes to a policy.

    Returns:
        Whether the value is kept.

    Guarantees:
        same result: loss and gradients are those without the policy.
        nothing twice: no statistic is measured or shared over devices in the backward pass.

    Raises:
        Nothing.

    References:
        Chen, Xu, Zhang, Guestrin (2016), Training Deep Nets with Sublinear Memory Cost,
        arXiv:1604.06174.

    Example:
        >>> import jax, jax.numpy as jnp, normjax
        >>> def block(x):
        ...     return jax.nn.gelu(normjax.layer_norm(jnp.sin(x)))
        >>> lean = jax.checkpoint(block, policy=normjax.norm_inputs_saveable)
        >>> lean(jnp.array([0.0, 1.0])).round(2)
        Array([-0.16,  0.84], dtype=float32)
    """
    return _named(primitive, *values, **params)


def input_of_norm(x: Array) -> Array:
    """x, with the name that `norm_inputs_saveable` keeps."""
    return checkpoint_name(x, _INPUT)


def moments_of_norm(moments: Any) -> Any:
    """moments, with the name that `norm_inputs_saveable` keeps."""

    def named(leaf: Any) -> Any:
        # A constant count needs no name.
        return checkpoint_name(leaf, _MOMENTS) if isinstance(leaf, Array) else leaf

    return jax.tree.map(named, moments)
