"""A network with batch norm that is served in training mode, and the guard that stops it.

python examples/evidence/wrong_mode.py            # ten seconds on two cores
python examples/evidence/wrong_mode.py --smoke    # seven seconds, to see that it runs
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import _evidence as evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _convolutions import CHANNELS, convolution, over_seeds
from _evidence import Claim, Conclusion, Options, spread
from _training import accuracy, cross_entropy, digits, train
from jax import Array
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import normjax.linen
from normjax import surgery

CLAIM = Claim(
    title="Served in training mode",
    text=(
        "A network with batch norm that is served in training mode loses accuracy, and how much "
        "depends on the batch that an image is served in."
    ),
    source=(
        "Ioffe & Szegedy 2015, section 3.1 (arXiv:1502.03167); a report: accuracy 0.2 with "
        "batches of 1 and 0.82 with batches of 32, "
        "https://github.com/tensorflow/tensorflow/issues/19548"
    ),
)
SIZES = [1, 2, 4, 8, 32, 360]
ORDERS = ("random order", "sorted by label")
# Loss of accuracy that counts, in points of 100.
POINTS = 5


class Found(NamedTuple):
    # By running statistics, (seeds,).
    correct: np.ndarray
    # In training mode, (seeds, orders, sizes).
    wrong: np.ndarray
    # Of surgery.guard, where the network is called in training mode.
    error: str


class Net(nn.Module):
    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        x = images
        for i, features in enumerate(CHANNELS[1:]):
            shape = (9 * x.shape[-1], features)
            weight = self.param(f"weight_{i}", nn.initializers.he_normal(), shape)
            x = convolution(x, weight, stride=2 if i == 1 else 1)
            x = nn.relu(normjax.linen.BatchNorm(momentum=0.9)(x, train=train))
        return nn.Dense(10)(x.mean((1, 2)))


def trained(seed: Array, steps: int) -> Any:
    """The variables of a network that was trained on batches of 32."""
    net, data = Net(), digits()

    def loss(params: Any, state: Any, images: Array, labels: Array, key: Array) -> Any:
        variables = {"params": params, "batch_stats": state}
        logits, moved = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, labels), moved["batch_stats"]

    init, batches = jax.random.split(jax.random.key(seed))
    variables = net.init(init, jnp.asarray(data.images[:2]), train=False)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)
    params, state, _ = train(
        loss,
        variables["params"],
        variables["batch_stats"],
        batches,
        steps=steps,
        batch_size=32,
        optimizer=optimizer,
    )
    return {"params": params, "batch_stats": state}


def served(variables: Any, images: Array, size: int) -> Array:
    """Logits in training mode, in batches of `size`; the last batch is what is left."""

    def apply(batch: Array) -> Any:
        return Net().apply(variables, batch, train=True, mutable=["batch_stats"])[0]

    whole = len(images) // size * size
    logits = jax.lax.map(apply, images[:whole].reshape(-1, size, *images.shape[1:]))
    logits = logits.reshape(whole, -1)
    return logits if whole == len(images) else jnp.vstack([logits, apply(images[whole:])])


def run(seed: Array, steps: int) -> tuple[Any, Array, Array]:
    """Variables, accuracy by running statistics, and accuracies in training mode."""
    variables, data = trained(seed, steps), digits()
    images, labels = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
    orders = jax.random.permutation(jax.random.key(seed), len(labels)), jnp.argsort(labels)
    wrong = [
        [accuracy(served(variables, images[order], size), labels[order]) for size in SIZES]
        for order in orders
    ]
    logits: Any = Net().apply(variables, images, train=False)
    correct = accuracy(logits, labels)
    return variables, correct, jnp.array(wrong)


def refusal(variables: Any) -> str:
    """What the guard says to a call in training mode."""
    images = digits().test_images[:1]
    serve: Any = surgery.guard(
        partial(jax.jit(Net().apply, static_argnames=("train", "mutable")), mutable="batch_stats")
    )
    try:
        serve(variables, images, train=True)
    except ValueError as error:
        return str(error)
    return ""


def measure(options: Options) -> Found:
    steps = 30 if options.smoke else 256
    ((variables, correct, wrong),) = over_seeds([partial(run, steps=steps)], options.seeds)
    return Found(correct, wrong, refusal(jax.tree.map(lambda v: v[0], variables)))


def conclude(found: Found) -> Conclusion:
    correct = 100 * found.correct.mean()
    random, ordered = 100 * found.wrong.mean(0)
    loses = correct - min(random.min(), ordered.min()) >= POINTS
    depends = np.ptp(np.concatenate([random, ordered])) >= POINTS
    one, eight = SIZES.index(1), SIZES.index(8)
    rows = [["running statistics", "any", *[spread(100 * found.correct, 1)] * 2]]
    for i, size in enumerate(SIZES):
        cells = [spread(100 * found.wrong[:, order, i], 1) for order in range(len(ORDERS))]
        rows.append(["training mode", str(size), *cells])
    return Conclusion(
        held="yes" if loses and depends else "partly" if loses or depends else "no",
        number=f"{random[one]:.0f} % in place of {correct:.0f} %, one image at a time",
        text=(
            f"A small convolutional network, trained on batches of 32, has a test accuracy of "
            f"{correct:.1f} % by its running statistics. In training mode it has {random[one]:.1f} "
            f"% on single images, {random[eight]:.1f} % in random batches of 8, "
            f"{ordered[eight]:.1f} % in batches of 8 that are sorted by label, and "
            f"{random[-1]:.1f} % on all 360 images at once. `normjax.surgery.guard` refuses the "
            f"call: `{found.error}`"
        ),
        header=["mode", "images in a batch", *(f"accuracy in %, {order}" for order in ORDERS)],
        rows=rows,
    )


def draw(figure: Figure, found: Found) -> None:
    axes = figure.subplots()
    correct = 100 * found.correct.mean()
    for i, (order, marker) in enumerate(zip(ORDERS, "os", strict=True)):
        values = 100 * found.wrong[:, i]
        (line,) = axes.plot(SIZES, values.mean(0), marker=marker, label=f"training mode, {order}")
        axes.fill_between(
            SIZES, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, lw=0
        )
    axes.axhline(correct, color="black", ls="--", label="running statistics")
    axes.set(
        xscale="log",
        xlabel="images in a batch that is served",
        ylabel="test accuracy in %",
        ylim=(0, 102),
    )
    axes.set_xticks(SIZES, list(map(str, SIZES)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(loc="lower right")
    figure.suptitle(f"Served in training mode: {conclude(found).number}")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw, seeds=5)
