"""Converts batch norms to group norms."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Collection, Mapping
from math import gcd
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from jax import Array

from normjax import Moments, _errors, normalize
from normjax._core.dtypes import accumulation_dtype
from normjax._core.moments import collapse
from normjax.surgery._paths import (
    At,
    Path,
    Tree,
    at_path,
    is_nnx,
    like,
    norms,
    path_name,
    patterns,
)

CALLED = "normjax.surgery.convert"
# Flax's names of layers without a given name: class and number.
AUTOMATIC = re.compile(r"(BatchNorm|BatchRenorm)_(\d+)")
# The number of groups of Wu and He, and the default of Flax.
USUAL = 32


@_errors.named(CALLED)
def convert(
    variables: Tree,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    at: At = None,
    epsilon: float | None = None,
) -> Tree:
    """Converts the variables of a model for the same model with group norm instead of batch norm.

        scale' = scale S / s,   bias' = bias + scale (M - running mean) / s

    with s^2 = running var + epsilon, and M, S^2 the mean and the variance of all channels of a
    group together. The output for an example whose groups have these moments does not change; with
    copied scale and bias it would change for every example. Fine-tune the converted model.

    Args:
        variables: all of the model with batch norm; or a model of flax.nnx.
        num_groups, group_size: as in `group_norm`, one of them for all layers. Without either each
            layer has 32 groups; if 32 does not divide its channels, it has the number nearest to 32
            with two channels or more in a group (the smaller of two such numbers, 1 for a prime
            number of channels): 16 channels have 8 groups, 35 have 7, 50 have 25. A warning names
            such layers, since the GroupNorm in the code of the model needs the same number.
        at: patterns over the paths of the layers, all if None.
        epsilon: of the batch norms; by default 1e-5 for variables, and each layer's own in a model.

    Returns:
        New variables; or a copy of the model of NNX, with group norms in place of its batch norms,
        which keep the activation and ignore a mode. Layers that linen named by their class are
        called GroupNorm_0, GroupNorm_1 and so on, in their order; given names stay.

    Guarantees:
        typical examples come out as before: exact where an example's groups have the moments of
            the running statistics.
        nothing else: other parameters are the same array objects.

    Edge cases:
        ===================================  ==================================================
        no scale, no bias                    taken as 1 and 0; the group norm has both
        layers stacked by scan or vmap       the last axis is the channels, the others are layers
        channels that 32 does not divide     the nearest number of groups, and a warning
        none of the batch norms is left      the result has no collection batch_stats
        the others are renumbered            as Flax will number them
        ===================================  ==================================================

    Raises:
        TypeError: `variables` is not a dictionary.
        ValueError: a given number or size that does not divide the channels (with all layers
            concerned); no statistics; a pattern that matches none; automatic names whose order
            among others cannot be known.

    References:
        Wu, He (2018), Group Normalization, arXiv:1803.08494.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from normjax import surgery
        >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> twin = nn.Sequential([nn.Dense(4), nn.GroupNorm(num_groups=2)])
        >>> twin.apply(surgery.convert(variables, num_groups=2), jnp.ones((2, 3))).shape
        (2, 4)
    """
    if is_nnx(variables):
        from normjax.surgery._nnx import convert

        groups_of = functools.partial(_groups, num_groups=num_groups, group_size=group_size)
        return convert.convert(variables, patterns(at), groups_of, _affine, epsilon)
    return _converted(variables, num_groups, group_size, at, 1e-5 if epsilon is None else epsilon)


def _converted(
    variables: Any, num_groups: int | None, group_size: int | None, at: At, epsilon: float
) -> Any:
    """Variables of linen."""
    chosen = norms(variables, at)
    groups = _groups(chosen, num_groups, group_size)
    names = _names(chosen, norms(variables), variables.get("params", {}))
    moved = {
        kind: _moved(tree, names, () if kind == "params" else chosen)
        for kind, tree in variables.items()
    }
    params = moved.get("params", {})
    for path, node in chosen.items():
        affine = meta.unbox(at_path(variables.get("params", {}), path))
        new = _affine(node, affine, groups[path], epsilon)
        params |= {(*names[path], name): value for name, value in new.items()}
    trees = {kind: unflatten_dict(tree) for kind, tree in {**moved, "params": params}.items()}
    if not trees["batch_stats"]:
        del trees["batch_stats"]
    return like(variables, trees)


def _groups(
    chosen: Mapping[Path, Mapping[str, Any]], num_groups: int | None, group_size: int | None
) -> dict[Path, int]:
    """The number of groups of each layer."""
    channels = {path: np.shape(node["mean"])[-1] for path, node in chosen.items()}
    layers = {
        n: ", ".join(f"'{path_name(path)}'" for path in channels if channels[path] == n)
        for n in sorted(set(channels.values()))
    }
    if num_groups is None and group_size is None:
        usual = {n: _nearest(n) for n in layers}
        others = [f"{usual[n]} for {layers[n]}" for n in layers if usual[n] != USUAL]
        if others:
            warnings.warn(
                f"{CALLED}: the groups are {'; '.join(others)}, since {USUAL} does not divide "
                "their channels. GroupNorm in the code of a model that loads them needs the same "
                "num_groups. Or pass num_groups= or group_size= that fits all layers.",
                stacklevel=4,
            )
        return {path: usual[n] for path, n in channels.items()}
    numbers, misfits = {}, []
    for n, paths in layers.items():
        try:
            at_paths = _errors.named(f"{CALLED} at {paths}")
            numbers[n] = at_paths(_errors.number_of_groups)(num_groups, group_size, n)
        except ValueError as error:
            misfits.append(str(error))
    if misfits:
        common = gcd(*layers)
        sizes = [n for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            "\n".join(misfits)
            + f"\nA group_size out of {sizes} divides the channels of all layers "
            "chosen. Or pass neither, for the number of groups nearest to 32 in each layer."
        )
    return {path: numbers[n] for path, n in channels.items()}


def _nearest(channels: int) -> int:
    """The usual number of groups, or else the nearest one with groups of two channels or more.

    Groups of one channel are instance norm; after a dense layer only the bias would remain.
    """
    if channels % USUAL == 0:
        return USUAL
    numbers = [n for n in range(1, channels // 2 + 1) if channels % n == 0] or [1]
    return min(numbers, key=lambda n: (abs(n - USUAL), n))


def _affine(
    node: Mapping[str, Any], affine: Mapping[str, Any], groups: int, epsilon: float
) -> dict[str, Array]:
    """The scale and the bias of the group norm."""
    mean, var = (jnp.asarray(node[name]) for name in ("mean", "var"))
    mean, var = (
        mean.astype(accumulation_dtype(mean.dtype)),
        var.astype(accumulation_dtype(var.dtype)),
    )
    *lead, channels = mean.shape
    # The moments of a group are the merged moments of its channels, with equal counts.
    stacked = (jnp.moveaxis(v.reshape(*lead, groups, -1), -1, 0) for v in (mean, var))
    group = collapse(Moments(np.float32(1), *stacked))
    center, spread = (
        jnp.repeat(v, channels // groups, axis=-1) for v in (group.mean, group.variance())
    )
    scale = jnp.asarray(affine.get("scale", jnp.ones(mean.shape, mean.dtype)))
    bias = jnp.asarray(affine.get("bias", jnp.zeros(mean.shape, mean.dtype)))
    # Group norm maps M to 0 and M + S to 1. The outputs for M and M + S are those of batch norm.
    at_zero = normalize(center, mean, var, scale, bias, epsilon=epsilon)
    slope = normalize(jnp.sqrt(spread), 0.0, var, scale, epsilon=epsilon)
    return {"scale": slope.astype(scale.dtype), "bias": at_zero.astype(bias.dtype)}


def _names(chosen: Collection[Path], known: Collection[Path], params: Any) -> dict[Path, Path]:
    """New paths of all batch norms, including those that are not converted."""
    names = {path: path for path in known}
    for parent in {path[:-1] for path in known if path}:
        automatic = {p: AUTOMATIC.fullmatch(p[-1]) for p in known if p[:-1] == parent}
        counted = [(m[1], int(m[2]), path) for path, m in automatic.items() if m]
        converted = [path for _, _, path in sorted(counted) if path in chosen]
        others = [name for name in at_path(params, parent) if re.fullmatch(r"GroupNorm_\d+", name)]
        if converted and (others or len({p[-1].split("_")[0] for p in converted}) > 1):
            among = sorted(others) or sorted(path[-1] for path in converted)
            raise ValueError(
                f"normjax: '{path_name(parent)}' holds layers that Flax has numbered by their "
                f"class, {among}, and how it would number them together with the converted ones "
                "depends on their order in the code. Give the layers names."
            )
        names |= {path: (*parent, f"GroupNorm_{i}") for i, path in enumerate(converted)}
        for kind in ("BatchNorm", "BatchRenorm"):
            left = [p for k, _, p in sorted(counted) if k == kind and p not in chosen]
            names |= {path: (*parent, f"{kind}_{i}") for i, path in enumerate(left)}
    return names


def _moved(
    tree: Mapping[str, Any], names: Mapping[Path, Path], dropped: Collection[Path]
) -> dict[Path, Any]:
    """A collection by paths, its norms under their new names."""
    if not isinstance(tree, Mapping):
        return {}
    flat = flatten_dict(dict(tree), keep_empty_nodes=True)
    return {
        (*names.get(path[:-1], path[:-1]), path[-1]): leaf
        for path, leaf in flat.items()
        if path[:-1] not in dropped and leaf is not empty_node
    }
