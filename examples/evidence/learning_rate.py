"""Learning rates that ruin a plain network, and what batch norm makes of them.

python examples/evidence/learning_rate.py            # half a minute on two cores
python examples/evidence/learning_rate.py --smoke    # a few seconds, to see that it runs
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import _evidence as evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import Claim, Conclusion, Options, spread
from _training import cross_entropy, dense_layers, digits, train
from jax import Array
from matplotlib.figure import Figure

import normjax

CLAIM = Claim(
    title="Learning rates",
    text="Batch norm allows learning rates that are 5 to 10 times higher.",
    source="Ioffe & Szegedy 2015, section 4.2 (arXiv:1502.03167)",
)
DEPTH, WIDTH, BATCH = 10, 64, 64
# The loss of a network that has learned nothing is log(10) = 2.3.
LEARNED = 0.1
NORMS = ("without norm", "batch norm")


class Found(NamedTuple):
    rates: np.ndarray
    # By norm: loss averaged over the last steps, (seeds, rates); infinite where it diverged.
    final: dict[str, np.ndarray]
    # By norm: steps until the loss of the last 20 steps is below LEARNED, (seeds, rates).
    steps: dict[str, np.ndarray]


def logits(layers: list[dict[str, Array]], x: Array, norm: str) -> Array:
    """DEPTH times dense, batch norm, ReLU; then dense. All batches are training batches here."""
    x = x.reshape(len(x), -1)
    for layer in layers[:-1]:
        x = x @ layer["weight"] + layer["bias"]
        if norm == "batch norm":
            x, _ = normjax.batch_norm(x, None, layer["scale"], layer["shift"], train=True)
        x = jax.nn.relu(x)
    return x @ layers[-1]["weight"] + layers[-1]["bias"]


def losses(seed: Array, rate: Array, norm: str, steps: int) -> Array:
    """The loss of each step of SGD."""

    def loss(params: Any, state: Any, images: Array, labels: Array, key: Array) -> Any:
        return cross_entropy(logits(params, images, norm), labels), state

    init, batches = jax.random.split(jax.random.key(seed))
    layers = dense_layers(init, [digits().images[0].size, *[WIDTH] * DEPTH, 10])
    return train(
        loss, layers, None, batches, steps=steps, batch_size=BATCH, optimizer=optax.sgd(rate)
    ).losses


def measure(options: Options) -> Found:
    steps = 30 if options.smoke else 600
    rates = np.logspace(-3, 1.5, 4 if options.smoke else 19)
    seeds = jnp.arange(options.seeds)
    final, first = {}, {}
    for norm in NORMS:
        run = partial(losses, norm=norm, steps=steps)
        all_rates = jax.vmap(run, in_axes=(None, 0))
        found = np.asarray(jax.jit(jax.vmap(all_rates, in_axes=(0, None)))(seeds, rates))
        window = min(20, steps)
        smooth = np.lib.stride_tricks.sliding_window_view(found, window, axis=-1).mean(-1)
        smooth = np.nan_to_num(smooth, nan=np.inf)
        final[norm] = smooth[..., -1]
        learned = smooth < LEARNED
        first[norm] = np.where(learned.any(-1), learned.argmax(-1) + window, np.inf)
    return Found(rates, final, first)


def highest(found: Found, norm: str) -> np.ndarray:
    """For each seed, the highest rate at which the network learns the training images."""
    learned = found.final[norm] < LEARNED
    rates: np.ndarray = np.where(learned, found.rates, 0).max(-1)
    return rates


def conclude(found: Found) -> Conclusion:
    plain, normed = (highest(found, norm) for norm in NORMS)
    factor = float(np.median(normed) / max(np.median(plain), found.rates[0]))
    quick = {norm: np.min(found.steps[norm], -1) for norm in NORMS}
    lowest = {norm: np.min(np.median(found.final[norm], 0)) for norm in NORMS}
    rows = [
        [
            norm,
            f"{np.median(highest(found, norm)):.2g}",
            f"{lowest[norm]:.4f}",
            spread(quick[norm], 0),
        ]
        for norm in NORMS
    ]
    return Conclusion(
        held="yes" if factor >= 5 else "partly" if factor > 1.5 else "no",
        number=f"{factor:.0f} times",
        text=(
            f"A network of {DEPTH} hidden layers learns the digits (training loss below {LEARNED}) "
            f"at learning rates up to {np.median(plain):.2g} without a norm and up to "
            f"{np.median(normed):.2g} with batch norm, {factor:.0f} times as high. At its best "
            f"rate it needs {np.mean(quick[NORMS[0]]):.0f} steps without and "
            f"{np.mean(quick[NORMS[1]]):.0f} with batch norm. The lowest loss at the end is "
            f"{lowest[NORMS[0]]:.4f} without and {lowest[NORMS[1]]:.4f} with batch norm, whose "
            "batches of training add noise."
        ),
        header=[
            "network", "highest rate that learns", "lowest final loss", "steps to learn, best rate",
        ],
        rows=rows,
    )  # fmt: skip


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for norm in NORMS:
        final = np.minimum(found.final[norm], 100)
        (line,) = left.plot(found.rates, np.median(final, 0), marker="o", ms=4, label=norm)
        left.fill_between(
            found.rates, final.min(0), final.max(0), color=line.get_color(), alpha=0.2
        )
        right.plot(found.rates, np.median(found.steps[norm], 0), marker="o", ms=4, label=norm)
    left.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="loss after training")
    left.axhline(LEARNED, color="gray", lw=1, ls=":")
    left.set_title("Final loss")
    left.legend()
    right.set(xscale="log", xlabel="learning rate", ylabel=f"steps until the loss is {LEARNED}")
    right.set_title("Steps to learn")
    figure.suptitle(conclude(found).number + " as high a learning rate with batch norm")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw)
