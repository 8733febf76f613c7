"""Draws which entries share a mean and a variance, for each norm, from what the norms do.

    python docs/axes.py            # writes docs/axes.png

Nothing here knows the axes of a norm: an entry is colored if changing it changes what happens to
the entry in the corner, up to the change of that entry itself.
"""

from functools import partial
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import normjax

N, L, C = 4, 4, 6
NORMS = {
    "batch_norm": lambda x: normjax.batch_norm(x, None, train=True)[0],
    "batch_norm, virtual\nbatches of 2": lambda x: normjax.batch_norm(
        x, None, train=True, virtual_batch_size=2
    )[0],
    "layer_norm\n(one position)": normjax.layer_norm,
    "layer_norm\naxis=(1, 2)": partial(normjax.layer_norm, axis=(1, 2)),
    "instance_norm": normjax.instance_norm,
    "group_norm\nnum_groups=2": partial(normjax.group_norm, num_groups=2),
}


def shared(norm):
    """True where an entry takes part in the statistics of entry (0, 0, 0)."""
    x = jax.random.normal(jax.random.key(0), (N, L, C))
    return np.abs(jax.grad(lambda x: norm(x)[0, 0, 0])(x)) > 1e-6


def draw(axis, title, entries):
    """The array as a block: features to the right, positions into the depth, examples down."""
    # From (example, position, feature) to (feature, position, example) with example 0 on top.
    block = entries.transpose(2, 1, 0)[:, :, ::-1]
    colors = np.where(block, "#D55E00", "#e8eef2")
    axis.voxels(np.ones_like(block), facecolors=colors, edgecolor="#7a8b99", linewidth=0.4)
    axis.set(title=title, xticks=[], yticks=[], zticks=[])
    axis.set_xlabel("features C", labelpad=-12)
    axis.set_ylabel("positions", labelpad=-12)
    axis.set_zlabel("examples N", labelpad=-14)
    axis.set_box_aspect((C, L, N))
    axis.view_init(elev=22, azim=-55)


def main():
    plt.style.use(Path(__file__).with_name("normjax.mplstyle"))
    figure = plt.figure(figsize=(13, 7.5), layout="constrained")
    for place, (title, norm) in enumerate(NORMS.items(), start=1):
        draw(figure.add_subplot(2, 3, place, projection="3d"), title, shared(norm))
    figure.suptitle(
        "Entries that share a mean and a variance with the first entry (top front left)"
    )
    figure.savefig(Path(__file__).with_name("axes.png"), dpi=80)


if __name__ == "__main__":
    main()
