"""Weights drawn far too small or too large, and what batch norm makes of them.

python examples/evidence/initialization.py            # a minute on two cores
python examples/evidence/initialization.py --smoke    # a few seconds, to see that it runs
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import _evidence as evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _deep import (
    BATCH,
    LEARNED,
    Network,
    Running,
    batch_norm,
    compiled,
    dense,
    flat,
    last,
    network,
    running,
)
from _evidence import Claim, Conclusion, Options, spread
from _training import accuracy, cross_entropy, digits, train
from jax import Array
from matplotlib.figure import Figure

CLAIM = Claim(
    title="Initialization",
    text=(
        "Batch norm makes a network less sensitive to its initial weights: it learns with weights "
        "of 0.01 to 10 times the usual deviation."
    ),
    source="Ioffe & Szegedy 2015, sections 1 and 3.3 (arXiv:1502.03167)",
)
DEPTH = 10
NORMS = ("without norm", "batch norm")
RATES = (0.01, 0.1, 1.0)
# The rate of the comparison at one rate for all gains.
FIXED = 1


class Found(NamedTuple):
    gains: np.ndarray
    # By norm: (seeds, rates, gains). The loss is that of the last steps, infinite where training
    # diverged; the accuracy is that on test images, with running statistics.
    final: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]


def logits(
    net: Network, stats: Running, images: Array, norm: str, train: bool
) -> tuple[Array, Running]:
    """DEPTH times dense, batch norm, ReLU; then dense."""

    def layer(x: Array, layer_and_stats: tuple[Any, Any]) -> tuple[Array, Any]:
        layer, stats = layer_and_stats
        x = dense(x, layer)
        if norm == "batch norm":
            x, stats = batch_norm(x, layer, stats, train)
        return jax.nn.relu(x), stats

    x, stem = layer(flat(images), (net.stem, stats.stem))
    x, hidden = jax.lax.scan(layer, x, (net.hidden, stats.hidden))
    return dense(x, net.head), Running(stem, hidden)


def outcome(seed: Array, rate: Array, gain: Array, norm: str, steps: int) -> tuple[Array, Array]:
    """Final loss and test accuracy after SGD."""

    def loss(net: Any, stats: Any, images: Array, labels: Array, key: Array) -> Any:
        y, stats = logits(net, stats, images, norm, train=True)
        return cross_entropy(y, labels), stats

    init, batches = jax.random.split(jax.random.key(seed))
    net, stats = network(init, DEPTH, gain), running(DEPTH)
    options: dict[str, Any] = dict(steps=steps, batch_size=BATCH, optimizer=optax.sgd(rate))
    trained = train(loss, net, stats, batches, **options)
    images = jnp.asarray(digits().test_images)
    y, _ = logits(trained.params, trained.state, images, norm, train=False)
    return last(trained.losses), accuracy(y, digits().test_labels)


def measure(options: Options) -> Found:
    steps = 30 if options.smoke else 500
    gains = np.logspace(-2, 1, 4 if options.smoke else 13)
    seeds, rates = jnp.arange(options.seeds), jnp.asarray(RATES)
    final, correct = {}, {}
    for norm in NORMS:
        run = partial(outcome, norm=norm, steps=steps)
        for axis in (2, 1, 0):
            run = jax.vmap(run, in_axes=tuple(0 if i == axis else None for i in range(3)))
        final[norm], correct[norm] = map(np.asarray, compiled(run)(seeds, rates, gains))
    return Found(gains, final, correct)


def best_rate(final: np.ndarray) -> np.ndarray:
    """For each gain, the index of the rate whose loss is lowest with the worst seed."""
    indices: np.ndarray = final.max(0).argmin(0)
    return indices


def of_best_rate(values: np.ndarray, final: np.ndarray) -> np.ndarray:
    """`values` (seeds, gains) at the best rate for each gain."""
    return values[:, best_rate(final), np.arange(final.shape[-1])]


def learned(final: np.ndarray) -> np.ndarray:
    """Which gains learn the training images with every seed; final (seeds, gains)."""
    result: np.ndarray = final.max(0) < LEARNED
    return result


def span(gains: np.ndarray) -> str:
    return f"{gains.min():.2g} to {gains.max():.2g}" if gains.size else "none"


def conclude(found: Found) -> Conclusion:
    gains, count = found.gains, len(found.gains)
    fixed = {n: learned(found.final[n][:, FIXED]) for n in NORMS}
    best = {n: learned(of_best_rate(found.final[n], found.final[n])) for n in NORMS}
    plain, normed = (int(fixed[n].sum()) for n in NORMS)
    held: Literal["yes", "partly", "no"]
    if normed == count and plain < count / 2:
        held = "yes"
    else:
        held = "partly" if normed >= 1.5 * max(plain, 1) else "no"
    accuracies = {n: np.median(found.accuracy[n][:, FIXED], 0) for n in NORMS}
    he = int(np.abs(np.log(gains)).argmin())
    rows = [
        [
            norm,
            f"{fixed[norm].sum()} of {count}",
            span(gains[fixed[norm]]),
            f"{best[norm].sum()} of {count}",
            *(spread(found.accuracy[norm][:, FIXED, i]) for i in (0, he, -1)),
        ]
        for norm in NORMS
    ]
    return Conclusion(
        held=held,
        number=f"{normed} of {count} weight scales learn with batch norm, {plain} without",
        text=(
            f"A network of {DEPTH} hidden layers starts from weights of {gains[0]:g} to "
            f"{gains[-1]:g} times the deviation of He et al., at {count} scales. At a learning "
            f"rate of {RATES[FIXED]:g} it learns the digits (training loss below {LEARNED} with "
            f"every seed) at {plain} of the scales without a norm and at {normed} with batch norm "
            f"({span(gains[fixed[NORMS[1]]])}); with the best of the rates "
            f"{', '.join(f'{r:g}' for r in RATES)} for each scale, at {best[NORMS[0]].sum()} and "
            f"{best[NORMS[1]].sum()}. The lowest test accuracy over all scales (running "
            f"statistics, momentum 0.9) is {accuracies[NORMS[0]].min():.2f} without and "
            f"{accuracies[NORMS[1]].min():.2f} with batch norm."
        ),
        header=[
            "network",
            f"scales that learn, rate {RATES[FIXED]:g}",
            "times He's deviation",
            "scales that learn, best rate",
            *(f"test accuracy, {gains[i]:g} times He's" for i in (0, he, -1)),
        ],
        rows=rows,
    )


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for norm in NORMS:
        final = np.minimum(found.final[norm], 100)
        for axes, values in ((left, final), (right, found.accuracy[norm])):
            at_fixed = values[:, FIXED]
            (line,) = axes.plot(found.gains, np.median(at_fixed, 0), marker="o", ms=4, label=norm)
            color = line.get_color()
            axes.fill_between(found.gains, at_fixed.min(0), at_fixed.max(0), color=color, alpha=0.2)
            best = np.median(of_best_rate(values, final), 0)
            axes.plot(found.gains, best, color=color, ls="--", lw=1.2)
    left.set(xscale="log", yscale="log", ylabel="loss after training")
    left.axhline(LEARNED, color="gray", lw=1, ls=":")
    left.set_title("Final training loss")
    right.set(xscale="log", ylabel="test accuracy", ylim=(0, 1.02))
    right.set_title("Test accuracy")
    for axes in (left, right):
        axes.set_xlabel("deviation of the weights / He's deviation")
    right.plot([], [], color="gray", ls="--", lw=1.2, label="best of 3 rates")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(conclude(found).number)


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw)
