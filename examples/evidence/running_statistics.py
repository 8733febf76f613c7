"""Running statistics that are noisy, stale, of other data, or frozen.

python examples/evidence/running_statistics.py            # a minute on two cores
python examples/evidence/running_statistics.py --smoke    # ten seconds, to see that it runs
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import _evidence as evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _convolutions import Layers, Norm, layers, logits, over_seeds, statistics
from _evidence import Claim, Conclusion, Options, spread
from _training import accuracy, cross_entropy, digits, train
from jax import Array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import normjax
from normjax import BatchStats

CLAIM = Claim(
    title="Running statistics",
    text=(
        "Running statistics that are noisy (momentum), stale (few steps) or of other data (drift) "
        "lower the accuracy in evaluation. Debiased or recomputed statistics restore it. Freezing "
        "them for the end of training helps with small batches."
    ),
    source=(
        "Wu & Johnson 2021, sections 3 to 5 (arXiv:2105.07576); for drift, Li et al. 2016 "
        "(arXiv:1603.04779)"
    ),
)
# Weights of the old value. 0.1 is PyTorch's 0.9 and the other way round: whoever takes the number
# of the other convention, in either direction, gets 0.1 in place of 0.9.
MOMENTA = np.array([0.01, 0.1, 0.5, 0.9, 0.99], np.float32)
RIGHT, CONFUSED = 3, 1
MOMENTUM_BATCHES = [4, 32]
# Batches of 512, evaluated after each 5 steps.
LARGE, EVERY, SEGMENTS = 512, 5, 20
STALE_STEPS = (20, 50)
DRIFTS: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda x, key: x,
    "contrast 0.3": lambda x, key: 0.3 * x,
    "offset 1": lambda x, key: x + 1.0,
    "noise 1": lambda x, key: x + jax.random.normal(key, x.shape),
}
RESTORABLE = ("contrast 0.3", "offset 1")
FROZEN_BATCHES = [1, 2, 32]
IMAGES = 8192


class Found(NamedTuple):
    # Accuracies on test images in evaluation mode, with a leading axis of seeds.
    # By batch size: (momenta), and with recomputed statistics.
    momenta: dict[int, tuple[np.ndarray, np.ndarray]]
    # By kind of statistics: after each 5 steps.
    stale: dict[str, np.ndarray]
    # (drifts): as trained, recomputed.
    drift: tuple[np.ndarray, np.ndarray]
    # By batch size: batch norm to the end, statistics frozen for the last fifth.
    frozen: dict[int, tuple[np.ndarray, np.ndarray]]


IN_TRAINING = partial(normjax.batch_norm, train=True, momentum=0.99)
IN_EVALUATION = partial(normjax.batch_norm, train=False)


class Training(NamedTuple):
    steps: int
    batch: int
    rate: float | optax.Schedule
    momentum: float | None = 0.9


def fit(
    params: Layers, stats: Any, key: Array, norm: Norm, options: Training
) -> tuple[Layers, Any]:
    def loss(params: Any, state: Any, images: Array, labels: Array, key: Array) -> Any:
        y, state = logits(params, state, images, norm)
        return cross_entropy(y, labels), state

    trained = train(
        loss,
        params,
        stats,
        key,
        steps=options.steps,
        batch_size=options.batch,
        optimizer=optax.sgd(options.rate, options.momentum),
    )
    return trained.params, trained.state


def recomputed(params: Layers, images: Array) -> list[BatchStats]:
    """The statistics of all images in one batch, as evaluation on these will see them."""
    # With momentum 0 the new statistics are those of the batch.
    return logits(params, statistics(), images, partial(IN_TRAINING, momentum=0.0))[1]


def evaluated(params: Layers, stats: list[BatchStats], images: Array) -> Array:
    """Accuracy on the test images, or on a changed copy of them."""
    return accuracy(logits(params, stats, images, IN_EVALUATION)[0], digits().test_labels)


def images_of(split: str) -> Array:
    return jnp.asarray(digits().images if split == "train" else digits().test_images)


def with_all_momenta(
    x: Array, stats: BatchStats, scale: Array, bias: Array
) -> tuple[Array, BatchStats]:
    """Batch norm in training, with running statistics for each momentum."""
    y, _ = normjax.batch_norm(x, None, scale, bias, train=True)
    moments = normjax.measure(x, axis=(0, 1, 2))

    def update(stats: BatchStats, momentum: Array) -> BatchStats:
        return normjax.update_stats(stats, moments, momentum=momentum)

    return y, jax.vmap(update)(stats, jnp.asarray(MOMENTA))


def of_momenta(seed: Array, batch: int, images: int) -> tuple[Array, Array]:
    """For each momentum, and by recomputed statistics; one training serves all."""
    init, batches = jax.random.split(jax.random.key(seed))
    many = jax.tree.map(lambda v: jnp.broadcast_to(v, (len(MOMENTA), *v.shape)), statistics())
    options = Training(images // batch, batch, 0.1 * batch / 32)
    params, stats = fit(layers(init), many, batches, with_all_momenta, options)
    test = images_of("test")
    by_momentum = jax.vmap(evaluated, (None, 0, None))(params, stats, test)
    return by_momentum, evaluated(params, recomputed(params, images_of("train")), test)


def of_large_batches(seed: Array, debias: bool, segments: int) -> tuple[Array, Array]:
    """By running and by recomputed statistics, after each few steps."""
    init, batches = jax.random.split(jax.random.key(seed))
    norm = partial(IN_TRAINING, debias=debias)

    def segment(carry: Any, key: Array) -> Any:
        # Plain SGD keeps nothing between steps, so training may stop and go on.
        options = Training(EVERY, LARGE, 0.5, momentum=None)
        params, stats = fit(carry[0], carry[1], key, norm, options)
        exact, test = recomputed(params, images_of("train")), images_of("test")
        return (params, stats), (evaluated(params, stats, test), evaluated(params, exact, test))

    carry = layers(init), statistics(counted=True)
    _, (running, exact) = jax.lax.scan(segment, carry, jax.random.split(batches, segments))
    return running, exact


def of_drift(seed: Array, images: int) -> tuple[Array, Array]:
    """On changed test images: as trained, and recomputed from changed training images."""
    init, batches, of_train, of_test = jax.random.split(jax.random.key(seed), 4)
    steps = images // 32
    options = Training(steps, 32, optax.cosine_decay_schedule(0.1, steps))
    params, stats = fit(layers(init), statistics(), batches, IN_TRAINING, options)
    before, after = [], []
    for change in DRIFTS.values():
        test = change(images_of("test"), of_test)
        exact = recomputed(params, change(images_of("train"), of_train))
        before.append(evaluated(params, stats, test))
        after.append(evaluated(params, exact, test))
    return jnp.stack(before), jnp.stack(after)


def of_freezing(seed: Array, batch: int, images: int) -> tuple[Array, Array]:
    """Both ways go on from the same network, with a tenth of the learning rate."""
    init, first, last = jax.random.split(jax.random.key(seed), 3)
    steps, rate = images // batch, 0.1 * batch / 32
    options = Training(steps * 4 // 5, batch, rate)
    params, stats = fit(layers(init), statistics(), first, IN_TRAINING, options)

    def end(norm: Norm) -> Array:
        options = Training(steps // 5, batch, rate / 10)
        return evaluated(*fit(params, stats, last, norm, options), images_of("test"))

    return end(IN_TRAINING), end(IN_EVALUATION)


def measure(options: Options) -> Found:
    images, segments = (256, 2) if options.smoke else (IMAGES, SEGMENTS)
    sizes, ends = MOMENTUM_BATCHES, FROZEN_BATCHES
    if options.smoke:
        sizes, ends = sizes[1:], ends[2:]
    found = over_seeds(
        [
            *(partial(of_momenta, batch=size, images=images) for size in sizes),
            *(partial(of_freezing, batch=size, images=images) for size in ends),
            *(partial(of_large_batches, debias=d, segments=segments) for d in (False, True)),
            partial(of_drift, images=images),
        ],
        options.seeds,
    )
    *others, (plain, exact), (debiased, _), drift = found
    return Found(
        momenta=dict(zip(sizes, others, strict=False)),
        stale={"running": plain, "running, debias=True": debiased, "recomputed": exact},
        drift=drift,
        frozen=dict(zip(ends, others[len(sizes) :], strict=True)),
    )


def claims(found: Found) -> dict[str, bool]:
    """Which effects are found, in points of 100."""
    noisy = [100 * (v[:, RIGHT] - v[:, CONFUSED]).mean() for v, _ in found.momenta.values()]
    running, debiased, exact = (100 * v.mean(0) for v in found.stale.values())
    # A smoke run has fewer steps.
    at = [min(steps // EVERY, len(exact)) - 1 for steps in STALE_STEPS]
    before, after = (dict(zip(DRIFTS, 100 * v.mean(0), strict=True)) for v in found.drift)
    gains = {size: 100 * (b - a).mean() for size, (a, b) in found.frozen.items()}
    return {
        "momentum": bool(np.mean(noisy) >= 2),
        "few steps": bool((exact - running)[at].min() >= 10),
        "repair by `debias=True`": bool((exact - debiased)[at].max() <= 5),
        "drift": all(
            before["none"] - before[name] >= 5 and before["none"] - after[name] <= 2
            for name in RESTORABLE
        ),
        "freezing": any(gain >= 1 for size, gain in gains.items() if size <= 2),
    }


def conclude(found: Found) -> Conclusion:
    held = claims(found)
    rows: list[list[str]] = []
    confused = []
    for size, (values, exact) in found.momenta.items():
        rows.extend(
            [f"momentum {m:.2g}, batches of {size}", spread(100 * v, 1), spread(100 * exact, 1)]
            for m, v in zip(MOMENTA, values.T, strict=True)
        )
        cost = 100 * (values[:, RIGHT] - values[:, CONFUSED]).mean()
        confused.append(f"{cost:.1f} points with batches of {size}")
    running, debiased, exact = found.stale.values()
    places = {steps: min(steps // EVERY, running.shape[1]) - 1 for steps in STALE_STEPS}
    for steps, at in places.items():
        for name, values in (("", running), (", debias=True", debiased)):
            cells = [spread(100 * v[:, at], 1) for v in (values, exact)]
            rows.append([f"{steps} steps of batches of {LARGE}, momentum 0.99{name}", *cells])
    steps = STALE_STEPS[-1]
    few = [100 * values[:, places[steps]].mean() for values in (running, debiased, exact)]
    drifted = []
    for name, before, after in zip(DRIFTS, *(v.T for v in found.drift), strict=True):
        rows.append([f"drift: {name}", spread(100 * before, 1), spread(100 * after, 1)])
        if name != "none":
            drifted.append(f"from {100 * before.mean():.1f} to {100 * after.mean():.1f} % ({name})")
    frozen = []
    for size, (to_the_end, stopped) in found.frozen.items():
        rows.append([f"batches of {size}", spread(100 * to_the_end, 1), ""])
        rows.append([f"batches of {size}, frozen for the last fifth", spread(100 * stopped, 1), ""])
        frozen.append(
            f"{100 * stopped.mean():.1f} in place of {100 * to_the_end.mean():.1f} % at {size}"
        )
    missing = ", ".join(name for name, found_here in held.items() if not found_here)
    return Conclusion(
        held="yes" if all(held.values()) else "partly" if any(held.values()) else "no",
        number=(
            f"{sum(held.values())} of {len(held)} effects; after {steps} steps {few[0]:.0f} % by "
            f"running statistics, {few[2]:.0f} % by recomputed ones"
        ),
        text=(
            f"Not confirmed: {missing or 'none'}. "
            f"A momentum of 0.1 in place of 0.9, the number of the other convention, costs "
            f"{' and '.join(confused)}. "
            f"After {steps} steps of batches of {LARGE} with momentum 0.99, the test accuracy is "
            f"{few[0]:.1f} % by the running statistics, {few[1]:.1f} % with `debias=True`, whose "
            f"average includes the statistics of all earlier weights, and {few[2]:.1f} % by "
            f"recomputed ones. On changed images, recomputed statistics raise the accuracy "
            f"{', '.join(drifted)}. Statistics that are frozen for the last fifth of the steps "
            f"give {', '.join(frozen)} images in a batch."
        ),
        header=["", "accuracy in %, running statistics", "accuracy in %, recomputed"],
        rows=rows,
    )


def draw(figure: Figure, found: Found) -> None:
    figure.set_size_inches(9, 7)
    (noisy, stale), (drift, frozen) = figure.subplots(2, 2)
    colors = dict(running="C0", debias="C1", recomputed="C2", frozen="C3")
    places = np.arange(len(MOMENTA))
    for (size, (values, exact)), style in zip(found.momenta.items(), ("--", "-"), strict=False):
        mean = 100 * values.mean(0)
        noisy.plot(places, mean, style, marker="o", color=colors["running"])
        noisy.axhline(100 * exact.mean(), color=colors["recomputed"], ls=style)
        noisy.plot([], [], style, color="gray", label=f"batches of {size}")
    noisy.legend(loc="lower left")
    noisy.set_xticks(places, [f"{m:.2g}" for m in MOMENTA])
    noisy.set(xlabel="momentum (weight of the old value)", ylabel="test accuracy in %")
    noisy.set_title("Momentum")
    steps = EVERY * np.arange(1, found.stale["running"].shape[1] + 1)
    for values, (name, color), marker in zip(
        found.stale.values(), list(colors.items())[:3], "osD", strict=True
    ):
        stale.plot(steps, 100 * values.mean(0), color=color, marker=marker, ms=4, label=name)
    stale.set(xlabel=f"steps of {LARGE} images", ylabel="test accuracy in %", ylim=(0, 102))
    stale.set_title("Few steps, momentum 0.99")
    for axes, names, kinds, pair in (
        (drift, list(DRIFTS), ("running", "recomputed"), [v.T for v in found.drift]),
        (
            frozen,
            list(map(str, found.frozen)),
            ("running", "frozen"),
            [np.stack(v) for v in zip(*found.frozen.values(), strict=True)],
        ),
    ):
        for i, (kind, values) in enumerate(zip(kinds, pair, strict=True)):
            bars = np.arange(len(names)) + 0.4 * (i - 0.5)
            axes.bar(bars, 100 * values.mean(-1), 0.38, color=colors[kind])
            axes.plot(np.repeat(bars, values.shape[-1]), 100 * values.ravel(), "k_", ms=8)
        axes.set_xticks(range(len(names)), names)
        axes.set(ylabel="test accuracy in %", ylim=(0, 102))
    drift.set_xlabel("change of the images (dashes: seeds)")
    drift.set_title("Drift")
    frozen.set_xlabel("images in a batch (dashes: seeds)")
    frozen.set_title("Frozen for the last fifth of the steps")
    labels = ("running statistics", "with debias=True", "recomputed", "frozen")
    handles = [Line2D([], [], color=color, lw=6) for color in colors.values()]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    held = claims(found)
    figure.suptitle(f"Running statistics: {sum(held.values())} of {len(held)} effects found")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw)
