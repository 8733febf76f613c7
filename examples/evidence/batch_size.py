"""Small batches: what batch norm loses, and norms that do not depend on the batch.

python examples/evidence/batch_size.py            # a minute and a half on two cores
python examples/evidence/batch_size.py --smoke    # ten seconds, to see that it runs
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import _evidence as evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _convolutions import Layers, Norm, layers, logits, over_seeds, statistics
from _evidence import Claim, Conclusion, Options
from _training import accuracy, cross_entropy, digits, train
from jax import Array
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import normjax
from normjax import BatchStats

CLAIM = Claim(
    title="Small batches",
    text="Batch norm loses accuracy when batches are small; group norm does not.",
    source="Wu & He 2018, section 4.1 (arXiv:1803.08494)",
)
SIZES = [1, 2, 4, 8, 16, 32]
# All see the same number of images; the learning rate grows linearly with the batch.
IMAGES, RATE_AT_32 = 8192, 0.1
DEVICES, VIRTUAL, GROUPS = 8, 4, 4
METHODS = {
    "batch norm": SIZES,
    "group norm": SIZES,
    "layer norm": SIZES,
    f"virtual batches of {VIRTUAL}": [8, 16, 32],
    "batch renormalization": SIZES,
    # Batches of 8, 16 and 32 images in all, with the learning rates of these.
    f"synchronized, {DEVICES} devices": [1, 2, 4],
}
BATCH, GROUP, LAYER, GHOST, RENORM, SHARED = METHODS
# Loss of accuracy that counts, in points of 100.
POINTS = 2


class Found(NamedTuple):
    # By method: accuracy on test images in evaluation mode, (sizes, seeds).
    test: dict[str, np.ndarray]
    # By method: accuracy on training images in training mode in batches of the size, likewise.
    train: dict[str, np.ndarray]


def norm_of(method: str, training: bool, steps: int) -> Norm:
    """The average of the running statistics covers the last 100 batches, or all if fewer."""
    options: dict[str, Any] = dict(train=training, momentum=0.99, debias=True)
    if method in (GROUP, LAYER):
        groups = GROUPS if method == GROUP else 1

        def of_example(
            x: Array, stats: BatchStats, scale: Array, bias: Array
        ) -> tuple[Array, BatchStats]:
            return normjax.group_norm(x, scale, bias, num_groups=groups), stats

        return of_example
    if method == RENORM:
        # As in the paper: batch norm at first, then bounds that grow to 3 and 5.
        def progress(count: Array) -> Array:
            return jnp.clip((count / steps - 0.1) / 0.4, 0, 1)

        return partial(
            normjax.batch_renorm,
            r_max=lambda count: 1 + 2 * progress(count),
            d_max=lambda count: 5 * progress(count),
            **options,
        )
    if method == GHOST and training:
        options["virtual_batch_size"] = VIRTUAL
    if method == SHARED and training:
        options["axis_name"] = "device"
    return partial(normjax.batch_norm, **options)


def in_training(
    params: Layers, stats: list[BatchStats], images: Array, method: str, steps: int
) -> tuple[Array, list[BatchStats]]:
    """Logits of a batch, which 8 devices share if the method is synchronized."""
    norm = norm_of(method, True, steps)
    if method != SHARED:
        return logits(params, stats, images, norm)
    parts = images.reshape(DEVICES, -1, *images.shape[1:])
    device = jax.vmap(partial(logits, norm=norm), (None, None, 0), axis_name="device")
    y, moved = device(params, stats, parts)
    return y.reshape(len(images), -1), jax.tree.map(lambda v: v[0], moved)


def accuracies(seed: Array, method: str, size: int, images: int) -> tuple[Array, Array]:
    """Of a trained network: on the test images, and on batches of training images."""
    batch = size * DEVICES if method == SHARED else size
    steps = images // batch

    def loss(params: Any, state: Any, images: Array, labels: Array, key: Array) -> Any:
        y, state = in_training(params, state, images, method, steps)
        return cross_entropy(y, labels), state

    init, batches = jax.random.split(jax.random.key(seed))
    rate = optax.cosine_decay_schedule(RATE_AT_32 * batch / 32, steps)
    optimizer = optax.sgd(rate, momentum=0.9)
    params, stats, _ = train(
        loss,
        layers(init),
        statistics(counted=True),
        batches,
        steps=steps,
        batch_size=batch,
        optimizer=optimizer,
    )
    data = digits()
    evaluation = norm_of(method, False, steps)
    unseen, _ = logits(params, stats, jnp.asarray(data.test_images), evaluation)
    # The training images are shuffled already.
    some = len(data.images) // batch * batch
    batched = jnp.asarray(data.images[:some]).reshape(-1, batch, *data.images.shape[1:])
    trained = jax.lax.map(lambda x: in_training(params, stats, x, method, steps)[0], batched)
    return (
        accuracy(unseen, data.test_labels),
        accuracy(trained.reshape(some, -1), data.labels[:some]),
    )


def measure(options: Options) -> Found:
    images = 256 if options.smoke else IMAGES
    sizes = {method: all[:1] if options.smoke else all for method, all in METHODS.items()}
    chosen = [(method, size) for method in METHODS for size in sizes[method]]
    runs = [partial(accuracies, method=m, size=size, images=images) for m, size in chosen]
    found = dict(zip(chosen, over_seeds(runs, options.seeds), strict=True))
    test, training = (
        {m: np.stack([found[m, size][kind] for size in sizes[m]]) for m in METHODS}
        for kind in (0, 1)
    )
    return Found(test, training)


def tested(found: Found, method: str, size: int) -> float:
    """Accuracy on test images in percent; a smoke run has the first size alone."""
    values = found.test[method]
    return float(100 * values[min(METHODS[method].index(size), len(values) - 1)].mean())


def lost(found: Found, method: str, size: int) -> float:
    """Points of accuracy that are lost from batches of 32 to batches of `size`."""
    return tested(found, method, 32) - tested(found, method, size)


def conclude(found: Found) -> Conclusion:
    batch, group = ({size: lost(found, m, size) for size in (1, 2)} for m in (BATCH, GROUP))
    claimed = [size for size in (1, 2) if batch[size] >= POINTS and group[size] < batch[size] / 2]
    rows = []
    for method, sizes in METHODS.items():
        means = 100 * np.stack([found.test[method], found.train[method]]).mean(-1)
        cells = [f"{test:.1f} ({training:.1f})" for test, training in means.T]
        by_size = dict(zip(sizes, cells, strict=False))
        rows.append([method, *(by_size.get(size, "") for size in SIZES)])
    one, two = (
        {m: tested(found, m, size) for m in METHODS if size in METHODS[m]} for size in (1, 2)
    )
    in_training_mode = 100 * found.train[BATCH][0].mean()
    return Conclusion(
        held="yes" if 2 in claimed else "partly" if claimed else "no",
        number=(
            f"{one[BATCH]:.0f} % at batch 1, {two[BATCH]:.0f} % at batch 2, "
            f"{tested(found, BATCH, 32):.0f} % at batch 32"
        ),
        text=(
            f"Small convolutional networks see {IMAGES} images, with a learning rate in proportion "
            f"to the batch. In evaluation mode batch norm has a test accuracy of {one[BATCH]:.1f} "
            f"% with batches of 1 ({in_training_mode:.1f} % on training images in training mode), "
            f"{two[BATCH]:.1f} % with batches of 2, which have 128 values for each channel in the "
            f"first layer, and {tested(found, BATCH, 32):.1f} % with batches of 32. At batch 1, "
            f"group norm has {one[GROUP]:.1f} %, batch renormalization {one[RENORM]:.1f} %, and "
            f"batch norm synchronized over {DEVICES} devices of one image {one[SHARED]:.1f} %."
        ),
        header=["test accuracy in % (training mode), batch of", *map(str, SIZES)],
        rows=rows,
    )


def draw(figure: Figure, found: Found) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, values, title in zip(
        panels,
        (found.test, found.train),
        ("Test images, evaluation mode", "Training images, training mode"),
        strict=True,
    ):
        for method, marker in zip(METHODS, "osD^vX", strict=True):
            errors = np.maximum(100 * (1 - values[method]), 0.1)
            sizes = METHODS[method][: len(errors)]
            (line,) = axes.plot(sizes, errors.mean(-1), marker=marker, ms=5, label=method)
            axes.fill_between(
                sizes, errors.min(-1), errors.max(-1), color=line.get_color(), alpha=0.12, lw=0
            )
        axes.set(xscale="log", yscale="log", xlabel="images in a batch (on each device)")
        axes.set_xticks(SIZES, list(map(str, SIZES)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks([0.1, 1, 10, 100], ["0.1 %", "1 %", "10 %", "100 %"])
        axes.set_title(title)
    panels[0].set_ylabel("errors")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"Batch norm: {conclude(found).number}")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw)
