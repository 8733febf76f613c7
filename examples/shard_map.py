"""Train the network of digits.py under shard_map on a mesh of four devices, and compare with pmap.

The code is that of one device, as under pmap: batch norm has the name of the axis over which
statistics are shared. The specs say that parameters are replicated and rows are sharded, and JAX
checks it.

    python examples/shard_map.py             # about a minute on two cores
    python examples/shard_map.py --smoke     # a short run of half a minute
"""

import sys
from functools import partial

import digits
import jax
from _beside_pmap import side_by_side
from jax.sharding import PartitionSpec as P


def make_step(model, optimizer, mesh):
    loss_fn = digits.make_loss(model)
    rows, whole = P("batch"), P()

    @partial(jax.jit, donate_argnums=0)
    @partial(jax.shard_map, mesh=mesh, in_specs=(whole, rows, rows, rows), out_specs=(whole, whole))
    def step(state, images, labels, real):
        params, batch_stats, opt_state = state
        total = jax.lax.psum(real.sum(), "batch")

        def whole_loss(params):
            # The loss is summed here, so autodiff sums the gradients of replicated parameters.
            # Under pmap the step has to sum them.
            loss, aux = loss_fn(params, batch_stats, images, labels, real, total)
            return jax.lax.psum(loss, "batch"), aux

        (loss, (moved, hits)), grads = jax.value_and_grad(whole_loss, has_aux=True)(params)
        params, opt_state = digits.descend(optimizer, params, opt_state, grads)
        return (params, moved, opt_state), (loss, jax.lax.psum(hits, "batch"))

    return step


def main(argv=None):
    apart = side_by_side("shard_map", __doc__, make_step, argv)
    assert max(apart.values()) < 1e-9, f"expected rounding errors of float64, got {apart}"
    return apart


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; nothing was written")
