"""Networks of 5 to 50 layers, with and without batch norm and residual connections.

python examples/evidence/depth.py            # two minutes on two cores
python examples/evidence/depth.py --smoke    # 15 seconds, to see that it runs
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
    title="Depth",
    text=(
        "Without batch norm and residual connections deep networks do not train; with both, "
        "networks of 5 to 50 layers do."
    ),
    source="He et al. 2016, sections 1 and 4 (arXiv:1512.03385)",
)
KINDS = ("plain", "batch norm", "residual", "residual, batch norm")
RATES = (0.003, 0.03, 0.3)
# Networks of tanh: how deep, the scales of their weights in units of He's, and from where on a
# unit counts as saturated (its derivative is below 0.06 there).
TANH_DEPTH, GAINS, SATURATED = 20, (1.0, 3.0), 0.97


class Found(NamedTuple):
    depths: tuple[int, ...]
    # By kind: (depths, seeds, rates). The loss is that of the last steps, infinite where training
    # diverged; the accuracy is that on test images, with running statistics.
    final: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]
    # By kind ("plain" or "batch norm"): (gains, before and after training, layers), mean over
    # seeds of the share of saturated activations.
    saturated: dict[str, np.ndarray]


def logits(
    net: Network, stats: Running, images: Array, residual: Array, normed: bool, train: bool
) -> tuple[Array, Running]:
    """A dense layer, then (norm, ReLU, dense) for each further one; norm, ReLU and the head.

    Of the plain network this is the usual order; of the residual one, pre-activation.
    """

    def activate(x: Array, layer: Any, stats: Any) -> tuple[Array, Any]:
        if normed:
            x, stats = batch_norm(x, layer, stats, train)
        return jax.nn.relu(x), stats

    def block(x: Array, layer_and_stats: tuple[Any, Any]) -> tuple[Array, Any]:
        layer, stats = layer_and_stats
        y, stats = activate(x, layer, stats)
        y = dense(y, layer)
        return jnp.where(residual, x + y, y), stats

    x = dense(flat(images), net.stem)
    x, hidden = jax.lax.scan(block, x, (net.hidden, stats.hidden))
    x, stem = activate(x, net.stem, stats.stem)
    return dense(x, net.head), Running(stem, hidden)


def outcome(
    net: Network, key: Array, rate: Array, residual: Array, normed: bool, depth: int, steps: int
) -> tuple[Array, Array]:
    """Final loss and test accuracy after SGD."""

    def loss(net: Any, stats: Any, images: Array, labels: Array, key: Array) -> Any:
        y, stats = logits(net, stats, images, residual, normed, train=True)
        return cross_entropy(y, labels), stats

    options: dict[str, Any] = dict(steps=steps, batch_size=BATCH, optimizer=optax.sgd(rate))
    trained = train(loss, net, running(depth), key, **options)
    images = jnp.asarray(digits().test_images)
    y, _ = logits(trained.params, trained.state, images, residual, normed, train=False)
    return last(trained.losses), accuracy(y, digits().test_labels)


def tanh_network(net: Network, images: Array, kind: str) -> tuple[Array, Array]:
    """Logits, and the share of saturated activations of each layer; norms use the batch."""
    stats = running(TANH_DEPTH)

    def layer(x: Array, layer_and_stats: tuple[Any, Any]) -> tuple[Array, Array]:
        layer, stats = layer_and_stats
        x = dense(x, layer)
        if kind == "batch norm":
            x, _ = batch_norm(x, layer, stats, train=True)
        x = jnp.tanh(x)
        return x, jnp.mean(jnp.abs(x) > SATURATED)

    x, first = layer(flat(images), (net.stem, stats.stem))
    x, others = jax.lax.scan(layer, x, (net.hidden, stats.hidden))
    return dense(x, net.head), jnp.concatenate([first[None], others])


def saturation(seed: Array, gain: Array, kind: str, steps: int) -> Array:
    """Shares of saturated activations on the test images, (before and after training, layers)."""

    def loss(net: Any, stats: Any, images: Array, labels: Array, key: Array) -> Any:
        return cross_entropy(tanh_network(net, images, kind)[0], labels), stats

    init, batches = jax.random.split(jax.random.key(seed))
    net = network(init, TANH_DEPTH, gain)
    options: dict[str, Any] = dict(steps=steps, batch_size=BATCH, optimizer=optax.sgd(RATES[1]))
    trained = train(loss, net, None, batches, **options)
    images = jnp.asarray(digits().test_images)
    return jnp.stack([tanh_network(n, images, kind)[1] for n in (net, trained.params)])


def measure(options: Options) -> Found:
    steps = 10 if options.smoke else 400
    depths = (5,) if options.smoke else (5, 10, 20, 50)
    seeds, rates = jnp.arange(options.seeds), jnp.asarray(RATES)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
    # Shallower networks are the first layers of the deepest one, whose weights are drawn once.
    nets = compiled(jax.vmap(partial(network, depth=depths[-1])))(keys[:, 0])
    final: dict[str, Any] = {kind: [] for kind in KINDS}
    correct: dict[str, Any] = {kind: [] for kind in KINDS}
    for depth in depths:
        hidden = {name: value[:, : depth - 1] for name, value in nets.hidden.items()}
        for normed in (False, True):
            run: Any = partial(outcome, normed=normed, depth=depth, steps=steps)
            run = jax.vmap(run, in_axes=(None, None, None, 0))
            run = jax.vmap(run, in_axes=(None, None, 0, None))
            run = compiled(jax.vmap(run, in_axes=(0, 0, None, None)))
            residual = jnp.array([False, True])
            found = run(nets._replace(hidden=hidden), keys[:, 1], rates, residual)
            for i, kind in enumerate(KINDS[normed::2]):
                final[kind].append(found[0][..., i])
                correct[kind].append(found[1][..., i])
    saturated = {}
    for kind in KINDS[:2]:
        tanh = partial(saturation, kind=kind, steps=steps)
        all_gains = jax.vmap(tanh, in_axes=(None, 0))
        shares = compiled(jax.vmap(all_gains, in_axes=(0, None)))(seeds, jnp.asarray(GAINS))
        saturated[kind] = np.asarray(shares).mean(0)
    stacked = [{k: np.stack(v) for k, v in values.items()} for values in (final, correct)]
    return Found(depths, stacked[0], stacked[1], saturated)


def at_best_rate(found: Found, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss and accuracy (depths, seeds), for each depth at the best rate.

    That is the rate whose loss is lowest with the worst seed.
    """
    best = found.final[kind].max(1).argmin(-1)[:, None, None]
    loss, correct = (
        np.take_along_axis(values[kind], best, -1)[..., 0]
        for values in (found.final, found.accuracy)
    )
    return loss, correct


def trains(found: Found, kind: str) -> list[int]:
    """Depths at which the network learns the training images with every seed."""
    loss, _ = at_best_rate(found, kind)
    return [d for d, values in zip(found.depths, loss, strict=True) if values.max() < LEARNED]


def conclude(found: Found) -> Conclusion:
    depths = {kind: trains(found, kind) for kind in KINDS}
    deepest = {kind: max(depths[kind], default=0) for kind in KINDS}
    both, plain = deepest["residual, batch norm"], deepest["plain"]
    held: Literal["yes", "partly", "no"]
    if len(depths["residual, batch norm"]) == len(found.depths) and plain < found.depths[-1]:
        held = "yes"
    else:
        held = "partly" if both > plain else "no"
    rows = []
    for kind in KINDS:
        loss, correct = at_best_rate(found, kind)
        losses = (f"{np.median(v):.2g}".replace("inf", "∞") for v in loss)
        rows.append([kind, *losses, *(spread(c) for c in correct)])
    diverged = [
        f"{d} ({kind})"
        for kind in KINDS
        for d, loss in zip(found.depths, at_best_rate(found, kind)[0], strict=True)
        if not np.isfinite(loss).all()
    ]
    before, after = (
        {kind: found.saturated[kind][-1, i].max() for kind in KINDS[:2]} for i in (0, 1)
    )
    return Conclusion(
        held=held,
        number=f"{both} layers with both, {plain} with neither",
        text=(
            "The deepest networks that learn the digits with every seed (training loss below "
            f"{LEARNED} at the best of the learning rates {', '.join(f'{r:g}' for r in RATES)}) "
            f"have {plain} layers without both, {deepest['batch norm']} with batch norm only, "
            f"{deepest['residual']} with residual connections only and {both} with both. "
            f"Diverged at every rate: {', '.join(diverged) or 'none'}. "
            f"In a tanh network of {TANH_DEPTH} layers whose weights have {GAINS[-1]:g} times "
            f"He's deviation, up to {before['plain']:.0%} of a layer's activations are saturated "
            f"(above {SATURATED}) before training and {after['plain']:.0%} after it; with batch "
            f"norm before the tanh it is {before['batch norm']:.0%} and "
            f"{after['batch norm']:.0%}."
        ),
        header=[
            "network",
            *(f"loss, {d} layers" for d in found.depths),
            *(f"test accuracy, {d} layers" for d in found.depths),
        ],
        rows=rows,
    )


def draw(figure: Figure, found: Found) -> None:
    figure.set_size_inches(9, 7)
    top, bottom = figure.subplots(2, 2)
    for kind in KINDS:
        for axes, values in zip(top, at_best_rate(found, kind), strict=True):
            values = np.minimum(values, 100)
            (line,) = axes.plot(found.depths, np.median(values, -1), marker="o", ms=5, label=kind)
            color = line.get_color()
            axes.fill_between(found.depths, values.min(-1), values.max(-1), color=color, alpha=0.2)
    for axes in top:
        axes.set(xscale="log", xlabel="layers")
        axes.set_xticks(found.depths, [str(d) for d in found.depths])
        axes.minorticks_off()
    top[0].set(yscale="log", ylabel="loss after training")
    top[0].axhline(LEARNED, color="gray", lw=1, ls=":")
    top[0].set_title("Final training loss")
    top[1].set(ylabel="test accuracy", ylim=(0, 1.02))
    top[1].set_title("Test accuracy")
    layers = np.arange(1, TANH_DEPTH + 1)
    for i, (axes, gain) in enumerate(zip(bottom, GAINS, strict=True)):
        for color, kind in zip(("C0", "C1"), KINDS[:2], strict=True):
            before, after = found.saturated[kind][i]
            axes.plot(layers, before, color=color, ls="--")
            axes.plot(layers, after, color=color)
        axes.set(xlabel="layer", ylabel=f"share with |tanh| > {SATURATED}", ylim=(0, 1))
        axes.set_title(f"Saturated units, {gain:g} times He's weights")
    bottom[0].plot([], [], color="gray", ls="--", label="before training")
    bottom[0].plot([], [], color="gray", label="after training")
    bottom[0].legend(loc="upper right")
    figure.legend(*top[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"Depth that trains: {conclude(found).number}")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw)
