"""Sums over devices, and whether all devices hold the same array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

AxisName = str | Sequence[str]
Groups = Sequence[Sequence[int]] | None


def total_over_devices(tree: Any, axis_name: AxisName, groups: Groups = None) -> Any:
    """`lax.psum`, also for groups where JAX does not implement it."""
    try:
        return lax.psum(tree, axis_name, axis_index_groups=groups)
    except NotImplementedError:
        # shard_map with check_vma=True cannot sum over groups. It can gather over groups of one
        # size.
        if len(set(map(len, groups or ()))) != 1:
            raise
        gathered = lax.all_gather(tree, axis_name, axis_index_groups=groups)
        return jax.tree.map(lambda v: jnp.sum(v, axis=0), gathered)


def varies(array: Array, axis_name: AxisName) -> bool:
    """Whether the type of an array says that it varies over the devices of `axis_name`.

    Under pmap, vmap and shard_map with check_vma=False, types never say so.
    """
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    array_type = jax.typeof(array)
    # JAX 0.10 has moved it.
    known = array_type.mat.varying if hasattr(array_type, "mat") else array_type.vma
    return bool(names & set(known))


def fingerprint(array: Array) -> Array:
    """A 64-bit hash of an array, as zeros and ones: their sum over devices tells if all agree.

    The finalizer of MurmurHash3 for each 32-bit word of the array and its position, with two seeds.
    """
    real = array if not jnp.iscomplexobj(array) else jnp.stack([array.real, array.imag])
    words = lax.bitcast_convert_type(real, jnp.uint32).ravel()
    positions = lax.iota(jnp.uint32, words.size)
    hashes = []
    for seed in (0x9E3779B9, 0x85EBCA77):
        mixed = words ^ (positions * np.uint32(seed) + np.uint32(seed))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
        hashes.append(jnp.sum(mixed, dtype=jnp.uint32))
    bits = jnp.stack(hashes)[:, None] >> lax.iota(jnp.uint32, 32)[None]
    return (bits & np.uint32(1)).astype(jnp.float32)


def agreed(total: Array, devices: int) -> Array:
    """Whether the fingerprints of all devices, of which this is the sum, are equal."""
    return jnp.all((total == 0) | (total == devices))
