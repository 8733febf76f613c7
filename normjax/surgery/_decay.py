"""Which parameters get weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from normjax import _errors
from normjax.surgery._paths import params_of

# The words of Flax, Haiku, Keras and PyTorch; a letter counts only as the whole name.
KERNELS = {"kernel"}
TABLES = {"embedding", "embeddings"}
SCALES = {"scale", "gamma", "gain", "alpha", "slope", "temperature"}
SHIFTS = {"bias", "biases", "beta", "offset", "shift", "threshold", "tau"}
BIASES = ("bias", "b", "beta", "offset")
STATISTICS = {"batch_stats", "running_mean", "running_var", "moving_mean", "moving_variance"}
# Positions are added to the input, tokens are concatenated with it: neither multiplies it.
POSITION = re.compile(r"pos(emb\w*|enc\w*|itions?|itional)?|wpe")
TOKENS = {"token", "tokens", "register", "registers"}
# What `pos` and `token` describe in the name of a layer: `pos_proj` is a matrix.
PRODUCTS = {"kernel", "weight", "weights", "proj", "projection", "linear", "dense", "conv", "mlp"}


@_errors.named("normjax.surgery.decay_mask")
def decay_mask(params: Any) -> Any:
    """A tree of booleans for `optax.adamw(mask=...)`: True for parameters with weight decay.

        True for kernels and embeddings, False for biases, positions, class, register and mask
        tokens, and the scales of norms

    The first rule that fits applies. Names are those of Flax, Haiku, Keras and PyTorch, at the end
    of the path; `_`, digits and capitals separate words, as in `in_proj_bias`.

    1. The scale of a normalized weight, `kernel/scale` of WeightNorm or `weight_g`: yes, since it
       is the length of the kernel, and decay of its direction changes nothing. The `gain` of a
       standardized weight: no (Brock et al. 2021).
    2. Integers, booleans, scalars and running statistics: no.
    3. Named as a bias, a scale, a position or a token: no, for any rank. The table of an
       embedding has the name of its layer: `wpe/embedding`, `embed_positions.weight` and
       `relative_attention_bias/embedding` are positions and a bias, `embed_tokens/embedding` is an
       embedding. Kernels of such layers, as `pos_proj.weight`, are kernels.
    4. Named as a kernel: yes, for any rank; named as an embedding and not a vector: yes.
    5. Of the shape of its module's bias, as the weight of a norm over several axes: no.
    6. Else a matrix, or an array with two axes longer than 1: yes; a vector: no.

    Args:
        params: pytree of arrays or shapes: linen params, `nnx.state(model, nnx.Param)`, a dict by
            dotted or slashed names, lists of (w, b) pairs, or a module that is a pytree. For a
            model of flax.nnx, its `nnx.Param`.

    Returns:
        A pytree of Python bools of the same structure (for NNX a state without variables, as
        `nnx.Optimizer` passes it to optax); the function itself may be the mask,
        `optax.adamw(1e-3, mask=surgery.decay_mask)`.

    Guarantees:
        kernels yes: of Dense, Conv, attention, embeddings, LoRA, recurrent cells.
        norms and biases no: of every module of Flax and of this library.
        positions and tokens no: by their usual names, as tables, parameters or vectors.
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
        ValueError: `params` is all variables of a linen model, with the collection `batch_stats`.

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
    params = params_of(params)
    if isinstance(params, Mapping) and {"params", "batch_stats"} <= set(params):
        raise ValueError(
            f"normjax: params has the collections {sorted(params)}, expected the parameters alone, "
            "which an optimizer updates. Pass variables['params']."
        )
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
    words = _words(name)
    if words & (SCALES | SHIFTS) or name == "b" or _is_added(path, shapes):
        return False
    if words & KERNELS or name == "w" or (words & TABLES and len(shape) > 1):
        return True
    if shape in [shapes.get((*parents, bias)) for bias in BIASES]:
        return False
    # A class token of shape (1, 1, features) is a vector, a layer of one feature is a matrix.
    return (
        len(shape) == 2 or (len(shape) > 2 and "weight" in words) or sum(n > 1 for n in shape) > 1
    )


def _is_length(name: str, parents: tuple[str, ...]) -> bool:
    """Whether this is the length of a weight: of linen, PyTorch, or PyTorch's parametrizations."""
    of_kernel = name == "scale" and parents[-1:] == ("kernel",)
    parametrized = name == "original0" and parents[-2:] == ("parametrizations", "weight")
    return of_kernel or parametrized or name == "weight_g"


def _is_added(path: tuple[str, ...], shapes: dict[tuple[str, ...], tuple[int, ...]]) -> bool:
    """A position, a token, or the table of a bias or of positions."""
    name, parents = path[-1] if path else "", path[:-1]
    words = _words(name)
    # Flax's name of an embedding without a given name says nothing about it.
    layer = _words(next((p for p in parents[::-1] if not re.fullmatch(r"Embed_\d+", p)), ""))
    in_embedding = any(word.startswith(("emb", "enc")) for word in layer)
    if name in TABLES:
        return bool(layer & SHIFTS) or _is_position(layer)
    if name == "weight":
        # PyTorch: a table, not a matrix, if its name says so and the layer has no bias.
        is_table = len(shapes[path]) == 2 and (*parents, "bias") not in shapes
        named = (in_embedding and _is_position(layer)) or _is_position(layer - {"pos"})
        return is_table and (bool(layer & SHIFTS) or named)
    is_added = bool(words & TOKENS) or _is_position(words)
    return not words & PRODUCTS and (is_added or (in_embedding and _is_position(layer)))


def _is_position(words: set[str]) -> bool:
    return not words & PRODUCTS and any(POSITION.fullmatch(word) for word in words)


def _words(name: str) -> set[str]:
    """The words of a name, split at `_`, digits and capitals: `in_proj_bias`, `PosEmbed_0`."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The words of a path, whether it is nested, dotted or slashed."""
    text = jax.tree_util.keystr(tuple(_unfolded(path)), simple=True, separator="/")
    names = [name for name in re.split(r"[/.]", text) if name]
    # An NNX variable holds its array one step further down.
    return tuple(names[:-1] if names[-1:] == ["value"] else names)


def _unfolded(path: tuple[Any, ...]) -> Iterator[Any]:
    """Expands the keys of NNX wrappers, which are paths of weights, to the paths of linen."""
    for key, following in zip(path, (*path[1:], None), strict=True):
        weight = getattr(following, "key", None)
        if isinstance(weight, tuple):
            names = (*weight, key.key.removesuffix("s"))
            yield from map(jax.tree_util.DictKey, names)
        elif not isinstance(getattr(key, "key", None), tuple):
            yield key


def _shape(path: tuple[str, ...], leaf: Any) -> tuple[int, ...]:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"normjax: {'/'.join(path) or 'params'} is {type(leaf).__name__}, expected "
            "an array. Pass the parameters alone, for example variables['params']."
        )
    return tuple(leaf.shape)
