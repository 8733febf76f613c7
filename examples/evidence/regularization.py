"""Overfitting on few images: no norm, batch norm, dropout, and both.

python examples/evidence/regularization.py            # a minute on two cores
python examples/evidence/regularization.py --smoke    # a few seconds, to see that it runs
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
from _training import accuracy, cross_entropy, dense_layers, digits, train
from jax import Array
from matplotlib.figure import Figure

import normjax

CLAIM = Claim(
    title="Regularization",
    text="Batch norm regularizes a network and reduces the need for dropout.",
    source="Ioffe & Szegedy 2015, sections 3.4 and 4.2.1 (arXiv:1502.03167)",
)
IMAGES, BATCH, RATE, DROPPED = 300, 32, 0.1, 0.5
DEPTH, WIDTH = 3, 128
SEGMENT = 50  # steps between two evaluations
# A fifth of wrong training labels is what a network should not learn by heart.
LABELS = {"true labels": 0.0, "20 % random labels": 0.2}
NETWORKS = ("neither", "batch norm", "dropout", "both")


class Measured(NamedTuple):
    """Arrays (seeds, evaluations)."""

    train_loss: np.ndarray
    test_loss: np.ndarray
    train_accuracy: np.ndarray
    test_accuracy: np.ndarray


class Found(NamedTuple):
    steps: np.ndarray
    # By training labels and network.
    measured: dict[tuple[str, str], Measured]


def logits(
    layers: list[dict[str, Array]],
    state: list[normjax.BatchStats],
    x: Array,
    key: Array | None,
    network: Array,
) -> tuple[Array, list[normjax.BatchStats]]:
    """DEPTH times dense, batch norm, ReLU, dropout; then dense. Without key: evaluation."""
    # Switches that are data let one program train all networks, which compiles four times faster.
    norm, dropout = network
    x, moved = x.reshape(len(x), -1), []
    kept = jnp.ones((DEPTH, len(x), WIDTH), bool)
    dropout_scale = jnp.where(dropout, 1 / (1 - DROPPED), 1)
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - DROPPED, kept.shape) | ~dropout
    for layer, stats, keep in zip(layers[:-1], state, kept, strict=True):
        x = x @ layer["weight"] + layer["bias"]
        normed, stats = normjax.batch_norm(
            x, stats, layer["scale"], layer["shift"], train=key is not None, momentum=0.9
        )
        moved.append(stats)
        x = jax.nn.relu(jnp.where(norm, normed, x))
        if key is not None:
            x = jnp.where(keep, x * dropout_scale, 0)
    return x @ layers[-1]["weight"] + layers[-1]["bias"], moved


def init(key: Array) -> tuple[list[dict[str, Array]], list[normjax.BatchStats]]:
    layers = dense_layers(key, [digits().images[0].size, *[WIDTH] * DEPTH, 10])
    return layers, [normjax.BatchStats.make(WIDTH) for _ in range(DEPTH)]


def curves(
    layers: Any, state: Any, images: Array, labels: Array, key: Array, network: Array, segments: int
) -> tuple[Array, ...]:
    """Trains on the first IMAGES images; tests on all others after each segment."""

    def loss(params: Any, state: Any, images: Array, labels: Array, key: Array) -> Any:
        y, state = logits(params, state, images, key, network)
        return cross_entropy(y, labels), state

    def segment(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], tuple[Array, ...]]:
        # SGD without momentum has no state, so training in segments is training at once.
        trained = train(
            loss,
            *carry,
            key,
            steps=SEGMENT,
            batch_size=BATCH,
            optimizer=optax.sgd(RATE),
            images=images[:IMAGES],
            labels=labels[:IMAGES],
        )
        y, _ = logits(trained.params, trained.state, images, None, network)
        parts = ((y[:IMAGES], labels[:IMAGES]), (y[IMAGES:], labels[IMAGES:]))
        found = [of(*part) for of in (cross_entropy, accuracy) for part in parts]
        return (trained.params, trained.state), tuple(found)

    _, found = jax.lax.scan(segment, (layers, state), jax.random.split(key, segments))
    return found


def measure(options: Options) -> Found:
    segments = 2 if options.smoke else 30
    data = digits()
    images = np.concatenate([data.images, data.test_images])
    true = np.concatenate([data.labels, data.test_labels])
    orders, labels = [], []
    for seed in range(options.seeds):
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(images))
        wrong, other = generator.random(IMAGES), generator.integers(0, 10, IMAGES)
        for share in LABELS.values():
            known = np.where(wrong < share, other, true[order[:IMAGES]])
            labels.append(np.concatenate([known, true[order[IMAGES:]]]))
        orders.append(order)
    keys = jax.vmap(jax.random.key)(jnp.arange(2 * options.seeds)).reshape(2, -1)
    layers, state = jax.jit(jax.vmap(init))(keys[0])
    switches = jnp.array(
        [
            [name in ("batch norm", "both") for name in NETWORKS],
            [name in ("dropout", "both") for name in NETWORKS],
        ]
    ).T
    run = jax.vmap(partial(curves, segments=segments), in_axes=(None,) * 5 + (0,))  # networks
    run = jax.vmap(run, in_axes=(None, None, None, 0, None, None))  # labels
    run = jax.vmap(run, in_axes=(0, 0, 0, 0, 0, None))  # seeds
    by_seed = np.stack(labels).reshape(options.seeds, len(LABELS), -1)
    found = jax.jit(run)(layers, state, images[np.stack(orders)], by_seed, keys[1], switches)
    measured = {
        (kind, name): Measured(*(np.asarray(values[:, i, j]) for values in found))
        for i, kind in enumerate(LABELS)
        for j, name in enumerate(NETWORKS)
    }
    return Found(SEGMENT * (1 + np.arange(segments)), measured)


def errors(found: Found, labels: str, network: str) -> np.ndarray:
    """Test error in percent at the end, by seed."""
    return 100 * (1 - found.measured[labels, network].test_accuracy[:, -1])


def exceeds_noise(differences: np.ndarray) -> bool:
    """Whether the mean of paired differences is above 0 by two standard errors."""
    error = differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else np.inf
    return bool(differences.mean() > 2 * error)


def conclude(found: Found) -> Conclusion:
    checks, significant, sentences, rows = [], [], [], []
    for labels in LABELS:
        neither, norm, dropout, both = (errors(found, labels, network) for network in NETWORKS)
        regularizes = exceeds_noise(neither - norm)
        without, beside = np.mean(neither - dropout), np.mean(norm - both)
        # Where dropout does not help, there is no need that could become less.
        checks += [regularizes, exceeds_noise(neither - dropout) and bool(beside < without / 2)]
        significant.append(regularizes)
        sentences.append(
            f"With {labels} the test error is {neither.mean():.1f} % with neither, "
            f"{norm.mean():.1f} % with batch norm, {dropout.mean():.1f} % with dropout and "
            f"{both.mean():.1f} % with both; dropout changes it by {-without:+.1f} points without "
            f"and by {-beside:+.1f} points with batch norm."
        )
        for network in NETWORKS:
            measured = found.measured[labels, network]
            rows.append(
                [
                    labels,
                    network,
                    spread(100 * measured.train_accuracy[:, -1], 1),
                    spread(errors(found, labels, network), 1),
                    spread(measured.test_loss[:, -1], 2),
                ]
            )
    true, noisy = ([errors(found, kind, name).mean() for name in NETWORKS[:2]] for kind in LABELS)
    return Conclusion(
        held="yes" if all(checks) else "partly" if any(checks) else "no",
        number=f"test error {true[0]:.1f} → {true[1]:.1f} %, {noisy[0]:.1f} → {noisy[1]:.1f} %",
        text=(
            f"Networks of {DEPTH} hidden layers of {WIDTH} learn {IMAGES} digits and are tested on "
            f"the other {sum(map(len, (digits().labels, digits().test_labels))) - IMAGES:,}. "
            + " ".join(sentences)
            + f" Batch norm lowers the error by more than two standard errors in "
            f"{sum(significant)} of {len(LABELS)} cases."
        ),
        header=["training", "network", "training accuracy, %", "test error, %", "test loss"],
        rows=rows,
    )


def draw(figure: Figure, found: Found) -> None:
    for panel, labels in zip(figure.subplots(1, 2, sharey=True), LABELS, strict=True):
        for network in NETWORKS:
            error = 100 * (1 - found.measured[labels, network].test_accuracy)
            mean, deviation = error.mean(0), error.std(0) / np.sqrt(len(error))
            (line,) = panel.plot(found.steps, mean, label=network)
            panel.fill_between(
                found.steps, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2
            )
        panel.set_title(f"Trained with {labels}")
        panel.set(xlabel="step of training", ylim=(0, 35))
    figure.axes[0].set(ylabel="test error, %")
    figure.axes[0].legend(ncols=2)
    lower = sum(
        exceeds_noise(errors(found, labels, "neither") - errors(found, labels, "batch norm"))
        for labels in LABELS
    )
    figure.suptitle(f"Batch norm alone lowers the test error in {lower} of {len(LABELS)} cases")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw, seeds=8)
