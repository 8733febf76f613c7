"""Which parameters weight decay is for."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

# The words of Flax, Haiku, Keras and PyTorch; a letter counts only as the whole name.
KERNELS = {"kernel", "embedding", "embeddings"}
SCALES = {"scale", "gamma", "gain", "alpha", "slope", "temperature"}
SHIFTS = {"bias", "beta", "offset", "shift", "threshold", "tau"}
BIASES = ("bias", "b", "beta", "offset")
STATISTICS = {"batch_stats", "running_mean", "running_var", "moving_mean", "moving_variance"}
# A position or a class token is added to the input, as a bias is.
ADDED = re.compile(r"pos(ition|itional)?_?(emb|enc)|(cls|class)_?token")


def decay_mask(params: Any) -> Any:
    """A tree of booleans: True where weight decay belongs, for `optax.adamw(mask=...)`.

        True for what multiplies an input (kernels, embeddings), False for what is added to one
        (biases, shifts, positions) and for the scales of norms

    The first rule that fits decides. Names are read in the words of Flax, Haiku, Keras and
    PyTorch, at the end of the path; `_` and digits part words, as in `in_proj_bias`.

    1. The scale of a normalized weight, `kernel/scale` of WeightNorm or `weight_g`: yes, since it
       is the length of the kernel, and decay of its direction changes nothing. The `gain` of a
       standardized weight: no (Brock et al. 2021).
    2. Integers, booleans, scalars and running statistics: no.
    3. Named as a bias, a scale, a position or a class token: no, whatever its rank.
    4. Named as a kernel or an embedding: yes, whatever its rank.
    5. Of the shape of its module's bias, as the weight of a norm over several axes: no.
    6. Else a matrix, or whatever has two axes longer than 1: yes; a vector: no.

    Args:
        params: pytree of arrays or shapes: linen params, a dict by dotted or slashed names, lists
            of (w, b) pairs, or a module that is a pytree.

    Returns:
        A pytree of Python bools of the same structure; the function itself may be the mask,
        `optax.adamw(1e-3, mask=surgery.decay_mask)`.

    Guarantees:
        kernels yes: of Dense, Conv, attention, embeddings, LoRA, recurrent cells.
        norms and biases no: of every module of Flax and of this library.
        any tree: nested and flat names give the same mask.

    Edge cases:
        ===================================  ==================================================
        bias of rank 2 (attention heads)     no
        scale of rank 2 (norm of two axes)   no
        kernel of one axis                   yes
        scale of WeightNorm                  yes
        empty tree                           an empty tree
        ===================================  ==================================================

    Raises:
        TypeError: a leaf without shape and dtype.

    References:
        Loshchilov, Hutter (2019), Decoupled Weight Decay Regularization, arXiv:1711.05101; Brock et
        al. (2021), High-Performance Large-Scale Image Recognition, arXiv:2102.06171.

    Example:
        >>> import jax.numpy as jnp
        >>> from normjax import surgery
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> surgery.decay_mask(params)
        {'Dense_0': {'bias': False, 'kernel': True}}
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [_names(path) for path, _ in leaves]
    shapes = {path: _shape(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)}
    decided = [
        jnp.issubdtype(leaf.dtype, jnp.inexact) and _decays(path, shapes)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(tree, map(bool, decided))


def _decays(path: tuple[str, ...], shapes: dict[tuple[str, ...], tuple[int, ...]]) -> bool:
    shape, name, parents = shapes[path], path[-1] if path else "", path[:-1]
    if _is_length(name, parents):
        return True
    if not shape or STATISTICS.intersection(path):
        return False
    words = {name} | set(re.split(r"[_\d]+", name))
    if words & (SCALES | SHIFTS) or name == "b" or _is_added(name, parents):
        return False
    if words & KERNELS or name == "w":
        return True
    if shape in [shapes.get((*parents, bias)) for bias in BIASES]:
        return False
    # A class token of shape (1, 1, features) is a vector, a layer of one feature is a matrix.
    return (
        len(shape) == 2 or (len(shape) > 2 and "weight" in words) or sum(n > 1 for n in shape) > 1
    )


def _is_length(name: str, parents: tuple[str, ...]) -> bool:
    """Of a normalized weight: in linen, in PyTorch, and in its parametrizations."""
    of_kernel = name == "scale" and parents[-1:] == ("kernel",)
    parametrized = name == "original0" and parents[-2:] == ("parametrizations", "weight")
    return of_kernel or parametrized or name == "weight_g"


def _is_added(name: str, parents: tuple[str, ...]) -> bool:
    table = name in {"embedding", "embeddings", "weight"} and parents
    return bool(ADDED.search(parents[-1] if table else name) or ADDED.search(name))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The words of a path, whether it is nested, dotted or slashed."""
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    names = [name for name in re.split(r"[/.]", text) if name]
    # An NNX variable holds its array one step further down.
    return tuple(names[:-1] if names[-1:] == ["value"] else names)


def _shape(path: tuple[str, ...], leaf: Any) -> tuple[int, ...]:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"surgery.decay_mask: {'/'.join(path) or 'params'} is {type(leaf).__name__}, expected "
            "an array. Pass the parameters alone, for example variables['params']."
        )
    return tuple(leaf.shape)
