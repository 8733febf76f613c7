"""Train the demo's network under jit over sharded arrays, beside pmap.

The code of one device, unchanged: no axis is named anywhere. Where the rows lie is said outside,
and jit shares the statistics over all of them by itself.

    python examples/sharded_jit.py             # about a minute on two cores
    python examples/sharded_jit.py --smoke     # half of it, to see that it runs
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
