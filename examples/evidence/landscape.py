"""How smooth the loss is along its gradient, and whether shifted activations harm training.

python examples/evidence/landscape.py            # half a minute on two cores
python examples/evidence/landscape.py --smoke    # 15 seconds, to see that it runs
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
    network,
    running,
)
from _evidence import Claim, Conclusion, Options, spread
from _training import accuracy, cross_entropy, digits, train
from jax import Array
from matplotlib.figure import Figure

CLAIM = Claim(
    title="Loss landscape",
    text=(
        "Batch norm makes the loss smoother along the gradient, and that, not a lower covariate "
        "shift, is why it helps: it helps as much when its output is shifted at random."
    ),
    source="Santurkar et al. 2018, sections 2.1 and 3.1 (arXiv:1805.11604)",
)
DEPTH, RATE = 10, 0.1
KINDS = ("without norm", "batch norm", "batch norm and shift")
# Steps along the gradient, in units of the learning rate, and after how many steps of training.
SIZES, EVERY = tuple(np.linspace(0.5, 4, 8)), 10
MEASURES = ("range of the loss", "change of the gradient", "effective beta-smoothness")


class Found(NamedTuple):
    # By kind: (seeds, steps).
    losses: dict[str, np.ndarray]
    # By kind: (seeds, measures, steps / EVERY).
    landscape: dict[str, np.ndarray]
    # By kind: how far the means of the activations move between two measurements, in units of
    # their deviation, (seeds,).
    shift: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]


def shifted(x: Array, key: Array) -> Array:
    """Random mean and deviation for each feature at each step, and a little more for each entry.

    The noise and the constants of Santurkar et al., appendix: n_mu = 0.5, n_sigma = 1.25,
    r_mu = r_sigma = 0.1.
    """
    of_mean, of_deviation, of_shift, of_factor = jax.random.split(key, 4)
    mean = jax.random.uniform(of_mean, x.shape[1:], minval=-0.5, maxval=0.5)
    deviation = jax.random.uniform(of_deviation, x.shape[1:], minval=1, maxval=1.25)
    shift = jax.random.uniform(of_shift, x.shape, minval=-0.1, maxval=0.1)
    factor = 0.1 * jax.random.normal(of_factor, x.shape)
    return x * (deviation + factor) + mean + shift


class Output(NamedTuple):
    logits: Array
    stats: Running
    # Mean and deviation of what enters each ReLU, (layers, features).
    mean: Array
    deviation: Array


def apply(
    net: Network, stats: Running, images: Array, key: Array, shift: Array, norm: bool, train: bool
) -> Output:
    """DEPTH times dense, batch norm, shift while training, ReLU; then dense."""

    def layer(x: Array, layer_and_stats: tuple[Any, Any, Any]) -> tuple[Array, Any]:
        layer, stats, key = layer_and_stats
        x = dense(x, layer)
        if norm:
            x, stats = batch_norm(x, layer, stats, train)
            x = jnp.where(shift, shifted(x, key), x) if train else x
        return jax.nn.relu(x), (stats, x.mean(0), x.std(0))

    keys = jax.random.split(key, DEPTH)
    x, first = layer(flat(images), (net.stem, stats.stem, keys[0]))
    x, others = jax.lax.scan(layer, x, (net.hidden, stats.hidden, keys[1:]))
    moments = (jnp.concatenate([a[None], b]) for a, b in zip(first[1:], others[1:], strict=True))
    return Output(dense(x, net.head), Running(first[0], others[0]), *moments)


def observe(seed: Array, shift: Array, norm: bool, steps: int) -> Any:
    """Trains with SGD; before every EVERY steps, looks along the gradient of one batch."""
    data = digits()
    train_images, train_labels = jnp.asarray(data.images), jnp.asarray(data.labels)

    def loss(net: Any, stats: Any, images: Array, labels: Array, key: Array) -> Any:
        output = apply(net, stats, images, key, shift, norm, train=True)
        return cross_entropy(output.logits, labels), output.stats

    def period(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Any]:
        net, stats = carry
        of_batch, of_noise, of_training = jax.random.split(key, 3)
        chosen = jax.random.randint(of_batch, (BATCH,), 0, len(train_images))
        images, labels = train_images[chosen], train_labels[chosen]

        def value(net: Network) -> Array:
            here: Array = loss(net, stats, images, labels, of_noise)[0]
            return here

        here, gradient = jax.value_and_grad(value)(net)
        length = optax.tree.norm(gradient)

        def look(size: Array) -> tuple[Array, Array]:
            moved = optax.tree.add_scale(net, -size, gradient)
            there, other = jax.value_and_grad(value)(moved)
            return there, optax.tree.norm(optax.tree.sub(other, gradient))

        sizes = RATE * jnp.asarray(SIZES)
        there, change = jax.vmap(look)(sizes)
        there = jnp.append(there, here)
        landscape = there.max() - there.min(), change.max(), (change / (sizes * length)).max()
        output = apply(net, stats, images, of_noise, shift, norm, train=True)
        options: dict[str, Any] = dict(steps=EVERY, batch_size=BATCH, optimizer=optax.sgd(RATE))
        trained = train(loss, net, stats, of_training, **options)
        observed = jnp.stack(landscape), output.mean, output.deviation, trained.losses
        return (trained.params, trained.state), observed

    init, batches = jax.random.split(jax.random.key(seed))
    carry = network(init, DEPTH), running(DEPTH)
    keys = jax.random.split(batches, steps // EVERY)
    (net, stats), (landscape, mean, deviation, losses) = jax.lax.scan(period, carry, keys)
    output = apply(net, stats, jnp.asarray(data.test_images), keys[0], shift, norm, train=False)
    # A unit that never varies has no shift.
    moves = jnp.abs(jnp.diff(mean, axis=0)) / jnp.maximum(deviation[1:], 1e-6)
    return losses.ravel(), landscape.T, jnp.median(moves), accuracy(output.logits, data.test_labels)


def measure(options: Options) -> Found:
    steps = 40 if options.smoke else 500
    results = []
    for norm, shifts in ((False, [False]), (True, [False, True])):
        run: Any = jax.vmap(partial(observe, norm=norm, steps=steps), in_axes=(None, 0))
        run = compiled(jax.vmap(run, in_axes=(0, None)))
        values = [np.asarray(v) for v in run(jnp.arange(options.seeds), jnp.array(shifts))]
        results += [[value[:, i] for value in values] for i in range(len(shifts))]
    named: Any = [dict(zip(KINDS, values, strict=True)) for values in zip(*results, strict=True)]
    return Found(*named)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Running mean over 20 steps."""
    return np.apply_along_axis(np.convolve, -1, losses, np.ones(20) / 20, "valid")


def steps_to_learn(losses: np.ndarray) -> np.ndarray:
    """For each seed, steps until the mean loss of 20 steps is below LEARNED; else infinite."""
    below = smooth(losses) < LEARNED
    return np.where(below.any(-1), below.argmax(-1) + 20, np.inf)


def smoother(found: Found, half: bool = False) -> np.ndarray:
    """By measure: the share of seeds and steps (or their first half) with the lower batch norm."""
    plain, normed = (found.landscape[kind] for kind in KINDS[:2])
    steps = plain.shape[-1] // 2 if half else plain.shape[-1]
    shares: np.ndarray = (normed < plain)[..., :steps].mean((0, 2))
    return shares


def conclude(found: Found) -> Conclusion:
    shares = smoother(found)
    typical = {k: np.median(found.landscape[k], (0, 2)) for k in KINDS}
    factors = typical["without norm"] / typical["batch norm"]
    needed = {k: np.median(steps_to_learn(found.losses[k])) for k in KINDS}
    plain, normed, noisy = (needed[k] for k in KINDS)
    # Smoother in three quarters of all steps by each measure; and no more than a quarter slower
    # with shift than without it, and faster than without a norm.
    smooth_enough = bool((shares >= 0.75).all())
    in_spite = bool(noisy <= 1.25 * normed and noisy < plain)
    final = {k: np.median(smooth(found.losses[k])[:, -1]) for k in KINDS}
    rows = [
        [
            kind,
            *(f"{v:.2g}" for v in typical[kind]),
            f"{np.median(found.shift[kind]):.2f}",
            f"{needed[kind]:.0f}",
            f"{final[kind]:.4f}",
            spread(found.accuracy[kind]),
        ]
        for kind in KINDS
    ]
    held: Literal["yes", "partly", "no"] = "no"
    if smooth_enough and in_spite:
        held = "yes"
    elif smooth_enough or in_spite:
        held = "partly"
    each = ", ".join(f"{m} at {s:.0%}" for m, s in zip(MEASURES, shares, strict=True))
    early = ", ".join(f"{s:.0%}" for s in smoother(found, half=True))
    first, second = (("holds" if ok else "does not hold") for ok in (smooth_enough, in_spite))
    return Conclusion(
        held=held,
        number=(
            f"range of the loss {factors[0]:.1f} times lower with batch norm, effective "
            f"beta-smoothness {factors[2]:.1f} times"
        ),
        text=(
            f"A network of {DEPTH} hidden layers trains at a learning rate of {RATE:g}; lower is "
            f"smoother. First claim: batch norm lowers the {each} of the steps. It {first} (75% "
            f"for each was required). In the first half of training it is {early}. Second claim: "
            f"the network learns the digits (training loss below {LEARNED}) after {plain:.0f} "
            f"steps without a norm, {normed:.0f} with batch norm and {noisy:.0f} with batch norm "
            "and random shift, whose means move by "
            f"{np.median(found.shift[KINDS[2]]):.2f} deviations between measurements "
            f"({np.median(found.shift[KINDS[0]]):.2f} without a norm). It {second} (required: at "
            "most a quarter slower than batch norm, and faster than no norm)."
        ),
        header=[
            "network",
            *MEASURES,
            "shift of the means / deviation",
            "steps to learn",
            "final loss",
            "test accuracy",
        ],
        rows=rows,
    )


def draw(figure: Figure, found: Found) -> None:
    figure.set_size_inches(9, 7)
    axes = figure.subplots(2, 2).ravel()
    shares = smoother(found)
    labels = ("loss", "l2 norm of the change", "change / length of step")
    for i, (panel, name, label) in enumerate(zip(axes, MEASURES, labels, strict=False)):
        for color, kind in zip(("C0", "C1"), KINDS[:2], strict=True):
            values = found.landscape[kind][:, i]
            steps = np.arange(values.shape[-1]) * EVERY
            panel.plot(steps, np.median(values, 0), color=color, label=kind)
            panel.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2)
        panel.set(yscale="log", xlabel="step of training", ylabel=label)
        panel.set_title(f"{name.capitalize()}:\nlower with batch norm in {shares[i]:.0%} of steps")
    for color, kind in zip(("C0", "C1", "C2"), KINDS, strict=True):
        values = smooth(found.losses[kind])
        steps = np.arange(values.shape[-1]) + 20
        axes[3].plot(steps, np.median(values, 0), color=color, label=kind)
        axes[3].fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2)
    axes[3].set(yscale="log", xlabel="step of training", ylabel="training loss")
    axes[3].axhline(LEARNED, color="gray", lw=1, ls=":")
    axes[3].set_title("Training, with random shift too")
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower center", ncols=3)


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw, seeds=5)
