"""One process of several: runs every case on its share of the rows and writes the results.

    python -m tests.worker ADDRESS PROCESSES INDEX FOLDER

tests/test_processes.py starts several, and calls `results` itself for the results of one process.
"""

import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from normjax import BatchStats, batch_norm

DEVICES = 4
SHAPE, AXES, MOMENTUM = (8, 5, 3), (0, 1), 0.9
CASES = ("no mask", "uneven rows", "an empty device", "NaN padding", "per-element mask")
DTYPES = ("float32", "bfloat16")
TRANSFORMATIONS = ("shard_map", "sharded jit")
# Seconds without a heartbeat after which a process counts as dead and the others stop.
HEARTBEAT = 10


def make_inputs(case, dtype):
    """x, scale, bias, mask and dy of the whole batch, equal in all processes."""
    rng = np.random.default_rng(CASES.index(case))
    x, dy = rng.normal(3, 2, SHAPE), rng.normal(size=SHAPE)
    scale, bias = rng.random((2, SHAPE[-1])).astype(np.float32) + 0.5
    rows, mask = np.arange(SHAPE[0])[:, None, None], None
    if case == "uneven rows":
        mask = rows < 7
    elif case == "an empty device":
        mask = (rows < 2) | (rows >= 4)
    elif case == "NaN padding":
        mask = (rng.random((*SHAPE[:-1], 1)) < 0.7) & (rows < 5)
        x = np.where(mask, x, np.nan)
    elif case == "per-element mask":
        mask = rng.random(SHAPE) < 0.6
    x, dy = (np.asarray(jnp.asarray(v.astype(np.float32), dtype)) for v in (x, dy))
    return x, scale, bias, mask, dy


def local_loss(x, scale, bias, mask, dy, axis_name):
    """This device's part of the loss; the whole loss where there is no named axis."""
    stats = BatchStats.make(SHAPE[-1])
    y, stats = batch_norm(
        x, stats, scale, bias, train=True, mask=mask, momentum=MOMENTUM, axis_name=axis_name
    )
    return jnp.sum((dy * y).astype(jnp.float32)), (y, stats)


def summed_loss(*args):
    """The loss of all devices, from the rows of one."""
    loss, aux = local_loss(*args, "d")
    return lax.psum(loss, "d"), aux


def value_and_grad(loss):
    def both(x, scale, bias, mask, dy):
        (_, (y, stats)), grads = jax.value_and_grad(
            lambda *args: loss(*args, mask, dy), (0, 1, 2), has_aux=True
        )(x, scale, bias)
        return y, stats, grads

    return both


def make_steps(mesh):
    """One jitted function for each transformation: cases of one shape share a compilation."""
    rows, whole = P("d"), P()
    outputs = (rows, whole, (rows, whole, whole))
    mapped = partial(
        jax.shard_map, value_and_grad(summed_loss), mesh=mesh, out_specs=outputs, check_vma=True
    )
    by_map = {
        masked: jax.jit(mapped(in_specs=(rows, whole, whole, rows if masked else whole, rows)))
        for masked in (False, True)
    }
    places = jax.tree.map(partial(NamedSharding, mesh), outputs)
    by_jit = jax.jit(value_and_grad(partial(local_loss, axis_name=None)), out_shardings=places)
    return {
        "shard_map": lambda *args: by_map[args[3] is not None](*args),
        "sharded jit": by_jit,
    }


def local(leaf):
    """The data of this process: its rows of a sharded array, its copy of a replicated one."""
    shards = sorted(leaf.addressable_shards, key=lambda s: s.index[0].start or 0)
    data = [np.asarray(s.data, np.float32) for s in shards]
    return data[0] if leaf.is_fully_replicated else np.concatenate(data)


def results():
    """By transformation, case, dtype: y, dx (rows of this process), dscale, dbias, mean, var."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("d",))
    steps = make_steps(mesh)
    size = SHAPE[0] // jax.process_count()
    mine = slice(size * jax.process_index(), size * (jax.process_index() + 1))

    def place(leaf, spec):
        held = leaf[mine] if spec else leaf
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), held)

    found = {}
    for case in CASES:
        for dtype in DTYPES:
            x, scale, bias, mask, dy = make_inputs(case, dtype)
            x, dy = place(x, P("d")), place(dy, P("d"))
            mask = None if mask is None else place(mask, P("d"))
            scale, bias = place(scale, P()), place(bias, P())
            for transformation in TRANSFORMATIONS:
                y, stats, (dx, dscale, dbias) = steps[transformation](x, scale, bias, mask, dy)
                arrays = dict(y=y, dx=dx, dscale=dscale, dbias=dbias, mean=stats[0], var=stats[1])
                for name, leaf in arrays.items():
                    found[f"{transformation}/{case}/{dtype}/{name}"] = local(leaf)
    return found


def main(address, processes, index, folder):
    processes, index = int(processes), int(index)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    jax.distributed.initialize(
        address,
        processes,
        index,
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    np.savez(Path(folder) / f"part{index}.npz", **results())
    Path(folder, f"done{index}").touch()
    # The test may request more steps, and kill a process during them.
    while Path(folder, "continue").exists():
        multihost_utils.sync_global_devices("one more step")
        time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:])
