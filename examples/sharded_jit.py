"""Train the network of digits.py under jit with sharded arrays, and compare with pmap.

The code is that for one device: it names no axis. The sharding of the rows is set outside, and jit
computes the statistics of all rows.

    python examples/sharded_jit.py             # about a minute on two cores
    python examples/sharded_jit.py --smoke     # a short run of half a minute
"""

import sys

import jax
from _beside_pmap import make_plain_step, side_by_side
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def make_step(model, optimizer, mesh):
    rows, whole = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    return jax.jit(
        make_plain_step(model, optimizer),
        in_shardings=(whole, rows, rows, rows),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )


def main(argv=None):
    apart = side_by_side("sharded jit", __doc__, make_step, argv)
    assert max(apart.values()) < 1e-9, f"expected rounding errors of float64, got {apart}"
    return apart


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; nothing was written")
