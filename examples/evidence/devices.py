"""Several devices with few images each: local statistics and synchronized ones.

python examples/evidence/devices.py            # a minute on two cores
python examples/evidence/devices.py --smoke    # ten seconds, to see that it runs
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import _evidence as evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _convolutions import QUICK, Norm, layers, logits, over_seeds, statistics
from _evidence import Claim, Conclusion, Options, spread
from _training import accuracy, cross_entropy, dense_layers, digits, train
from jax import Array
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import normjax
from normjax import BatchStats

CLAIM = Claim(
    title="Several devices",
    text=(
        "With few images on each device, local statistics lose accuracy, and synchronized ones "
        "recover that of the whole batch."
    ),
    source="Peng et al. 2018, MegDet, section 3.3 (arXiv:1711.07240)",
)
# Valid images on each of 8 devices; of the uneven ones, one has none.
COUNTS = {
    "2 on each": (2,) * 8,
    "4 on each": (4,) * 8,
    "uneven": (4, 4, 4, 4, 2, 1, 1, 0),
}
NETWORKS = ("dense", "convolutional")
METHODS = ("local", "synchronized", "whole batch")
LOCAL, SHARED, WHOLE = METHODS
# Accuracy that local statistics lose, and that synchronized ones recover to, in points of 100.
LOST, RECOVERED = 1, 1
# A relative difference in float64 that rounding explains.
EXACT = 1e-10
IMAGES = 8192


class Found(NamedTuple):
    # Test accuracy by (network, counts, method), (seeds,).
    accuracies: dict[tuple[str, str, str], np.ndarray]
    # Of an untrained network in float64, the largest difference from the whole batch in a logit
    # and in a gradient, in parts of the largest one; likewise.
    differences: dict[tuple[str, str, str], tuple[float, float]]


def network(kind: str, params: Any, stats: Any, images: Array, norm: Norm) -> tuple[Array, Any]:
    """Two hidden layers of 64, or three convolutions; each with a norm and ReLU."""
    if kind == "convolutional":
        return logits(params, stats, images, norm)
    x, moved = images.reshape(len(images), -1), []
    for layer, old in zip(params[:-1], stats, strict=True):
        x, new = norm(x @ layer["weight"], old, layer["scale"], layer["shift"])
        x = jax.nn.relu(x)
        moved.append(new)
    return x @ params[-1]["weight"] + params[-1]["bias"], moved


def initial(kind: str, key: Array) -> tuple[Any, list[BatchStats]]:
    if kind == "convolutional":
        return layers(key), statistics(counted=True)
    sizes = [digits().images[0].size, 64, 64, 10]
    return dense_layers(key, sizes), [BatchStats.make(n, counted=True) for n in sizes[1:-1]]


def in_training(
    kind: str, params: Any, stats: Any, images: Array, method: str, counts: tuple[int, ...]
) -> tuple[Array, Any]:
    """Logits of the valid images of all devices; statistics with an axis for the devices."""
    size = max(counts)
    valid = np.arange(size) < np.array(counts)[:, None]

    def device(stats: Any, images: Array, mask: Array) -> tuple[Array, Any]:
        mask = mask.reshape(-1, *[1] * (3 if kind == "convolutional" else 1))
        norm = partial(
            normjax.batch_norm,
            train=True,
            momentum=0.99,
            debias=True,
            mask=mask,
            axis_name="device" if method == SHARED else None,
        )
        return network(kind, params, stats, images, norm)

    images, mask = images.reshape(len(counts), size, *images.shape[1:]), jnp.asarray(valid)
    if method == WHOLE:
        # One device, on which no image is padding.
        images, mask = images[valid][None], mask[valid][None]
    y, moved = jax.vmap(device, axis_name="device")(stats, images, mask)
    return y.reshape(-1, 10) if method == WHOLE else y[valid], moved


def valid_labels(labels: Array, counts: tuple[int, ...]) -> Array:
    slots = labels.reshape(len(counts), -1)
    return slots[np.arange(slots.shape[1]) < np.array(counts)[:, None]]


def for_devices(stats: Any, method: str, counts: tuple[int, ...]) -> Any:
    """A copy of the statistics for each device."""
    devices = 1 if method == WHOLE else len(counts)
    return jax.tree.map(lambda v: jnp.broadcast_to(v, (devices, *v.shape)), stats)


def trained_accuracy(
    seed: Array, kind: str, method: str, counts: tuple[int, ...], images: int
) -> Array:
    """On the test images, by the mean over devices of their running statistics."""

    def loss(params: Any, state: Any, images: Array, labels: Array, key: Array) -> Any:
        y, state = in_training(kind, params, state, images, method, counts)
        return cross_entropy(y, valid_labels(labels, counts)), state

    init, batches = jax.random.split(jax.random.key(seed))
    params, stats = initial(kind, init)
    steps = images // sum(counts)
    rate = optax.cosine_decay_schedule(0.1 * sum(counts) / 32, steps)
    params, state, _ = train(
        loss,
        params,
        for_devices(stats, method, counts),
        batches,
        steps=steps,
        batch_size=max(counts) * len(counts),
        optimizer=optax.sgd(rate, momentum=0.9),
    )
    data = digits()
    evaluation = partial(normjax.batch_norm, train=False)
    averaged = [BatchStats(stats.mean.mean(0), stats.var.mean(0)) for stats in state]
    y, _ = network(kind, params, averaged, jnp.asarray(data.test_images), evaluation)
    return accuracy(y, data.test_labels)


def differences(kind: str, on: str) -> dict[tuple[str, str, str], tuple[float, float]]:
    """From the whole batch, of the logits and of the gradients of an untrained network."""
    counts = COUNTS[on]
    slots = max(counts) * len(counts)

    def gradient(method: str, variables: Any, images: Array, labels: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> tuple[Array, Array]:
            stats = for_devices(variables[1], method, counts)
            y, _ = in_training(kind, params, stats, images, method, counts)
            return cross_entropy(y, labels), y

        found: tuple[Any, Array] = jax.grad(loss, has_aux=True)(variables[0])
        return found

    def distance(ours: Any, whole: Any) -> float:
        ours, whole = (
            jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(t)]) for t in (ours, whole)
        )
        return float(jnp.abs(ours - whole).max() / jnp.abs(whole).max())

    with jax.enable_x64(True):
        images = jnp.asarray(digits().images[:slots], jnp.float64)
        labels = valid_labels(jnp.asarray(digits().labels[:slots]), counts)
        variables = jax.tree.map(
            lambda v: v.astype(jnp.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v,
            initial(kind, jax.random.key(0)),
        )
        by_method = {
            method: jax.jit(partial(gradient, method), compiler_options=QUICK)(
                variables, images, labels
            )
            for method in METHODS
        }
        gradients, whole = by_method[WHOLE]
        return {
            (kind, on, method): (distance(y, whole), distance(of_loss, gradients))
            for method, (of_loss, y) in by_method.items()
        }


def measure(options: Options) -> Found:
    images = 320 if options.smoke else IMAGES
    chosen = [(kind, on) for kind in NETWORKS for on in COUNTS]
    if options.smoke:
        chosen = [(NETWORKS[0], "uneven")]
    keys = [(*setting, method) for setting in chosen for method in METHODS]
    runs = [
        partial(trained_accuracy, kind=kind, method=method, counts=COUNTS[on], images=images)
        for kind, on, method in keys
    ]
    accuracies = dict(zip(keys, over_seeds(runs, options.seeds), strict=True))
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    for setting in chosen:
        found |= differences(*setting)
    return Found(accuracies, found)


def settings(found: Found) -> list[tuple[str, str]]:
    return list(dict.fromkeys((kind, on) for kind, on, _ in found.accuracies))


def lost(found: Found, method: str) -> np.ndarray:
    """Points of accuracy between the whole batch and the method, in each setting."""
    means = {key: 100 * values.mean() for key, values in found.accuracies.items()}
    return np.array([means[*key, WHOLE] - means[*key, method] for key in settings(found)])


def worst(found: Found, method: str) -> float:
    """The largest difference in a logit or gradient over all settings."""
    return max(max(v) for (_, _, m), v in found.differences.items() if m == method)


def conclude(found: Found) -> Conclusion:
    local, shared = lost(found, LOCAL), lost(found, SHARED)
    recovers = bool(np.abs(shared).max() <= RECOVERED and worst(found, SHARED) < EXACT)
    loses = local >= LOST
    rows = [
        [
            kind,
            on,
            *(spread(100 * found.accuracies[kind, on, method], 1) for method in METHODS),
            *(f"{found.differences[kind, on, method][1]:.1e}" for method in (LOCAL, SHARED)),
        ]
        for kind, on in settings(found)
    ]
    kinds = np.array([kind for kind, _ in settings(found)])
    ranges = " and ".join(
        f"{local[kinds == kind].min():.1f} to {local[kinds == kind].max():.1f} points in the "
        f"{kind} network"
        for kind in dict.fromkeys(kinds)
    )
    return Conclusion(
        held="yes" if loses.all() and recovers else "partly" if loses.any() and recovers else "no",
        number=(
            f"up to {local.max():.1f} points lost by local statistics, "
            f"at most {np.abs(shared).max():.1f} by synchronized ones"
        ),
        text=(
            f"Networks are trained on {len(COUNTS['uneven'])} simulated devices with 2 images, "
            f"4 images, or {', '.join(map(str, COUNTS['uneven']))} images, and evaluated by the "
            f"mean of the devices' running statistics. Compared with the whole batch on one "
            f"device, local statistics lose {ranges}; synchronized statistics differ by at most "
            f"{np.abs(shared).max():.1f} points. In float64, logits and gradients of an untrained "
            f"network differ from those of the whole batch by at most {worst(found, SHARED):.0e} "
            f"of the largest one with synchronized statistics, the empty device included, and by "
            f"up to {worst(found, LOCAL):.1f} times the largest one with local ones."
        ),
        header=[
            "network", "images on a device", *(f"accuracy in %, {method}" for method in METHODS),
            "difference of gradients, local", "the same, synchronized",
        ],
        rows=rows,
    )  # fmt: skip


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    places = np.arange(len(settings(found)))
    for i, (method, marker) in enumerate(zip(METHODS, "osD", strict=True)):
        errors = np.stack([100 * (1 - found.accuracies[*key, method]) for key in settings(found)])
        mean = errors.mean(-1)
        bars = np.stack([mean - errors.min(-1), errors.max(-1) - mean])
        options = dict(fmt=marker, ms=6, capsize=3, color=f"C{i}")
        left.errorbar(places + 0.2 * (i - 1), mean, bars, label=method, **options)
        if method != WHOLE:
            gaps = [found.differences[*key, method][1] for key in settings(found)]
            right.plot(places, np.maximum(gaps, 1e-17), marker, ms=7, color=f"C{i}")
    names = [
        # The name of the network stands below the middle of its settings.
        f"{on.removesuffix(' on each')}\n{kind if i % len(COUNTS) == 1 else ''}"
        for i, (kind, on) in enumerate(settings(found))
    ]
    for axes in (left, right):
        axes.set_xticks(places, names)
        axes.set_xlabel("network and images on each device")
    left.set(yscale="log", ylabel="test images classified wrongly")
    left.set_yticks([1, 2, 5, 10, 20, 50], [f"{v} %" for v in (1, 2, 5, 10, 20, 50)])
    left.yaxis.set_minor_locator(NullLocator())
    left.set_title("Errors after training")
    left.legend()
    right.set(yscale="log", ylabel="relative difference from the whole batch", ylim=(1e-17, 1e2))
    right.set_title("Gradients, in float64")
    lost_points = lost(found, LOCAL).max(), np.abs(lost(found, SHARED)).max()
    figure.suptitle("Local: up to {:.1f} points lost. Synchronized: {:.1f}".format(*lost_points))


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw)
