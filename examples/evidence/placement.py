"""Batch norm before or after the activation, in residual blocks, and the bias before it.

python examples/evidence/placement.py            # a minute on two cores
python examples/evidence/placement.py --smoke    # 15 seconds, to see that it runs
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
    WIDTH,
    Layer,
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
    title="Placement",
    text=(
        "Batch norm works before and after the activation, pre-activation residual blocks do "
        "better than post-activation ones, and a bias before batch norm is redundant."
    ),
    source=(
        "Ioffe & Szegedy 2015, section 3.2 (arXiv:1502.03167); He et al. 2016 (arXiv:1603.05027)"
    ),
)
# The stem and 10 residual blocks of two layers.
DEPTH, RATE = 21, 0.1
BEFORE, AFTER, POST, PRE = PLACEMENTS = (
    "before activation",
    "after activation",
    "post-activation residual",
    "pre-activation residual",
)
# Each bias of these is followed by nothing but sums until a norm subtracts the mean.
REDUNDANT = (BEFORE, POST, PRE)
# Largest gradient of a redundant bias, relative to that of the weights, and largest change of the
# output: a hundred times what a sum over a batch rounds away in float32.
ROUNDING = 1e-4


class Found(NamedTuple):
    # By placement: (seeds, variants), which are without and with bias and the control.
    accuracy: dict[str, np.ndarray]
    # By placement, (seeds,): the largest gradient of a bias over the largest of a weight, before
    # or after training; and how far random biases move the logits, relative to the largest.
    gradient: dict[str, np.ndarray]
    change: dict[str, np.ndarray]
    # By dtype and placement: losses (seeds, variants, steps).
    losses: dict[str, dict[str, np.ndarray]]


class Case(NamedTuple):
    """1 or 0 each.

    Attributes:
        residual: whether blocks of two layers have a residual connection.
        bias: whether products have a bias.
        rounded: whether the initial weights differ by one rounding error, as a control.
    """

    residual: Array
    bias: Array
    rounded: Array


def logits(
    net: Network, stats: Running, images: Array, order: str, case: Case, train: bool
) -> tuple[Array, Running]:
    """Stem, 20 layers, head, in the order BEFORE, AFTER or PRE; BEFORE is POST if residual.

    The norm of the stem follows the stem; in pre-activation, the last block.
    """

    def product(x: Array, layer: Layer) -> Array:
        # Without bias: it is 0, has no gradient and stays 0.
        return x @ layer["weight"] + case.bias * layer["bias"]

    def normed(x: Array, layer: Layer, stats: Any) -> tuple[Array, Any]:
        x, stats = batch_norm(jax.nn.relu(x) if order == AFTER else x, layer, stats, train)
        return jax.nn.relu(x) if order == PRE else x, stats

    def activated(x: Array) -> Array:
        return jax.nn.relu(x) if order == BEFORE else x

    def one_layer(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Any]:
        x, skip = carry
        layer, stats, ends_block = inputs
        if order == PRE:
            x, stats = normed(x, layer, stats)
            x = product(x, layer)
        else:
            x, stats = normed(product(x, layer), layer, stats)
        x = activated(x + case.residual * ends_block * skip)
        return (x, jnp.where(ends_block, x, skip)), stats

    stem = stats.stem
    x = product(flat(images), net.stem)
    if order != PRE:
        x, stem = normed(x, net.stem, stem)
        x = activated(x)
    ends_block = jnp.arange(DEPTH - 1) % 2 == 1
    (x, _), hidden = jax.lax.scan(one_layer, (x, x), (net.hidden, stats.hidden, ends_block))
    if order == PRE:
        x, stem = normed(x, net.stem, stem)
    return dense(x, net.head), Running(stem, hidden)


def largest(net: Network, name: str) -> Array:
    """Largest absolute value in the stem and the hidden layers."""
    return jnp.maximum(jnp.abs(net.stem[name]).max(), jnp.abs(net.hidden[name]).max())


def outcome(
    net: Network, key: Array, offsets: Array, case: Case, order: str, steps: int
) -> dict[str, Array]:
    """Trains with SGD; losses, test accuracy, and what the biases do."""
    data = digits()
    stats = jax.tree.map(lambda v: v.astype(offsets.dtype), running(DEPTH))
    net = jax.tree.map(lambda v: v * (1 + case.rounded * np.finfo(v.dtype).eps), net)
    test = jnp.asarray(data.test_images)

    def loss(net: Any, stats: Any, images: Array, labels: Array, key: Array) -> Any:
        y, stats = logits(net, stats, images, order, case, train=True)
        return cross_entropy(y, labels), stats

    def relative_gradient(net: Network) -> Array:
        batch = jnp.asarray(data.images[:BATCH]), jnp.asarray(data.labels[:BATCH])
        gradient, _ = jax.grad(loss, has_aux=True)(net, stats, *batch, key)
        return largest(gradient, "bias") / largest(gradient, "weight")

    def with_offsets(factor: Array) -> Array:
        stem, hidden = trained.params.stem, trained.params.hidden
        stem = {**stem, "bias": stem["bias"] + factor * offsets[0]}
        hidden = {**hidden, "bias": hidden["bias"] + factor * offsets[1:]}
        moved = trained.params._replace(stem=stem, hidden=hidden)
        return logits(moved, stats, test, order, case, train=True)[0]

    options: dict[str, Any] = dict(steps=steps, batch_size=BATCH, optimizer=optax.sgd(RATE))
    trained = train(loss, net, stats, key, **options)
    y, _ = logits(trained.params, trained.state, test, order, case, train=False)
    begin_and_end = jax.tree.map(lambda *nets: jnp.stack(nets), net, trained.params)
    as_is, moved = jax.vmap(with_offsets)(jnp.arange(2))
    return {
        "losses": trained.losses,
        "accuracy": accuracy(y, data.test_labels),
        "gradient": jax.vmap(relative_gradient)(begin_and_end).max(),
        "change": jnp.abs(moved - as_is).max() / jnp.abs(as_is).max(),
    }


def outcomes(
    placements: tuple[tuple[str, ...], ...], seeds: int, steps: int, variants: int
) -> dict[str, dict[str, Any]]:
    """By name and placement: (seeds, variants), from the same weights and batches.

    The variants are without bias, with it, and, if there are 3, without it from rounded weights.
    Placements that differ in the residual connections only are compiled as one.
    """

    def draw(seed: Array) -> tuple[Network, Array, Array]:
        init, batches, of_offsets = jax.random.split(jax.random.key(seed), 3)
        offsets = jax.random.normal(of_offsets, (DEPTH, WIDTH))
        return network(init, DEPTH), batches, offsets

    start = compiled(jax.vmap(draw))(jnp.arange(seeds))
    results: dict[str, dict[str, Any]] = {}
    for group in placements:
        residual = jnp.array([placement in (POST, PRE) for placement in group])
        residual, variant = jnp.meshgrid(residual, jnp.arange(variants), indexing="ij")
        cases = Case(residual, variant == 1, variant == 2)
        run: Any = partial(outcome, order=group[0], steps=steps)
        for _ in range(2):
            run = jax.vmap(run, in_axes=(None, None, None, 0))
        run = compiled(jax.vmap(run, in_axes=(0, 0, 0, None)))
        for name, value in run(*start, cases).items():
            for i, placement in enumerate(group):
                results.setdefault(name, {})[placement] = np.asarray(value)[:, i]
    return results


def measure(options: Options) -> Found:
    steps = 10 if options.smoke else 400
    found = outcomes(((BEFORE, POST), (AFTER,), (PRE,)), options.seeds, steps, variants=2)
    # The same in float64 shows that the two curves part by rounding, and by nothing else.
    with jax.enable_x64(True):
        redundant = () if options.smoke else ((BEFORE, POST), (PRE,))
        wide = outcomes(redundant, min(options.seeds, 2), steps, variants=3)
    gradient, change = (
        {placement: value[:, 1] for placement, value in found[name].items()}
        for name in ("gradient", "change")
    )
    losses = {"float32": found["losses"], "float64": wide.get("losses", {})}
    return Found(found["accuracy"], gradient, change, losses)


def parted(losses: np.ndarray, variant: int = 1) -> np.ndarray:
    """For each step, the largest difference of the losses from those without bias."""
    difference: np.ndarray = np.abs(losses[:, 0] - losses[:, variant]).max(0)
    return difference


def conclude(found: Found) -> Conclusion:
    # Without bias; the two parts of the claim about accuracy.
    correct = {p: found.accuracy[p][:, 0] for p in PLACEMENTS}
    between = float(correct[BEFORE].mean() - correct[AFTER].mean())
    better = correct[PRE] - correct[POST]
    error = float(better.std(ddof=1) / np.sqrt(len(better))) if len(better) > 1 else 0.0
    gradient = max(found.gradient[p].max() for p in REDUNDANT)
    change = max(found.change[p].max() for p in REDUNDANT)
    wide = {p: parted(losses).max() for p, losses in found.losses["float64"].items()}
    control = {p: parted(losses, 2).max() for p, losses in found.losses["float64"].items()}
    apart = max(wide.values(), default=np.inf)
    parts = (
        abs(between) <= 0.01 and min(correct[p].mean() for p in (BEFORE, AFTER)) > 0.9,
        bool(better.mean() > 2 * error),
        bool(gradient < ROUNDING and change < ROUNDING),
        bool(apart < 1e-6),
    )
    held: Literal["yes", "partly", "no"] = "partly" if any(parts) else "no"
    if all(parts):
        held = "yes"
    both, pre, no_effect, curves = (("holds" if part else "does not hold") for part in parts)
    differences = ", ".join(f"{v:.0e} ({p})" for p, v in wide.items())
    controls = ", ".join(f"{v:.0e}" for v in control.values())
    rows = [
        [
            placement,
            *(spread(found.accuracy[placement][:, i]) for i in (0, 1)),
            f"{found.gradient[placement].max():.1e}",
            f"{found.change[placement].max():.1e}",
            *(
                f"{parted(losses[placement]).max():.1e}" if placement in losses else ""
                for losses in found.losses.values()
            ),
            f"{control[placement]:.1e}" if placement in control else "",
        ]
        for placement in PLACEMENTS
    ]
    return Conclusion(
        held=held,
        number=f"gradient of a redundant bias {gradient:.0e} of that of the weights",
        text=(
            f"Networks of {DEPTH - 1} layers and a stem. Before the activation: "
            f"{100 * between:+.2f} percentage points of test accuracy, compared with after it. "
            f"That both work {both} (at most 1 point apart, both above 0.9). Pre-activation: "
            f"{100 * better.mean():+.1f} ± {100 * error:.1f} points (standard error), compared "
            f"with post-activation. That it does better {pre} (two standard errors). The gradient "
            f"of a bias before a norm is at most {gradient:.0e} of the largest of the weights, and "
            f"random biases change the logits by at most {change:.0e} of the largest. That the "
            f"bias has no effect {no_effect}. In float64 the losses with and without it differ in "
            f"the course of training by up to {differences}. That they are equal (to 1e-6) "
            f"{curves}. As a control, the differences between two networks without bias whose "
            f"initial weights differ by one rounding error: {controls}."
        ),
        header=[
            "placement",
            "test accuracy without bias",
            "with bias",
            "largest gradient of a bias / of a weight",
            "change of the output by random biases",
            "difference of the losses, float32",
            "float64",
            "float64, control",
        ],
        rows=rows,
    )


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
    for i, placement in enumerate(PLACEMENTS):
        for j, marker in enumerate(("o", "s")):
            values = found.accuracy[placement][:, j]
            at = np.full(len(values), i + 0.3 * j - 0.15)
            left.plot(values, at, marker, color=f"C{i}", ms=5, mfc="none" if j else None)
            left.plot([values.mean()], at[:1], "|", color="black", ms=16, mew=2)
    left.set_yticks(range(len(PLACEMENTS)), [p.replace(" ", "\n") for p in PLACEMENTS])
    left.set(xlabel="test accuracy (bar: mean)")
    left.invert_yaxis()
    left.set_title("Accuracy of each seed")
    left.plot([], [], "o", color="gray", label="without bias")
    left.plot([], [], "s", color="gray", mfc="none", label="with bias")
    for dtype, style in (("float32", "-"), ("float64", "--")):
        for i, placement in enumerate(PLACEMENTS):
            if placement in found.losses[dtype]:
                values = np.maximum.accumulate(parted(found.losses[dtype][placement]))
                # A difference of exactly 0 has no place on a logarithmic axis.
                values = np.where(values == 0, np.nan, values)
                right.plot(np.arange(1, len(values) + 1), values, style, color=f"C{i}", lw=1.2)
    right.set(
        xscale="log", yscale="log", xlabel="step of training", ylabel="largest difference so far"
    )
    right.set_title("Losses with and without bias")
    if BEFORE in found.losses["float64"]:
        rounded = parted(found.losses["float64"][BEFORE], 2)
        values = np.maximum.accumulate(rounded)
        right.plot(np.arange(1, len(values) + 1), values, ":", color="black", lw=1.5)
    right.plot([], [], color="gray", label="float32")
    right.plot([], [], color="gray", ls="--", label="float64")
    right.plot([], [], color="black", ls=":", label="control, float64")
    figure.legend(loc="outside lower center", ncols=5)
    figure.suptitle(conclude(found).number.capitalize())


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw, seeds=5)
