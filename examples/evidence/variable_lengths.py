"""Padding in the statistics of sequences of different lengths, with and without a mask.

python examples/evidence/variable_lengths.py            # half a minute on two cores
python examples/evidence/variable_lengths.py --smoke    # a few seconds, to see that it runs
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
    title="Sequences of different lengths",
    text=(
        "Batch norm without a mask mixes padding into its statistics, so what it returns for a "
        "sequence depends on the padding; layer norm and RMS norm are not affected."
    ),
    source=(
        "Laurent et al. 2015 (arXiv:1510.01378), who count frames without padding; Ba et al. 2016, "
        "section 3.1 (arXiv:1607.06450)"
    ),
)
STEPS, SHORTEST, WIDTH, BATCH, RATE = 8, 2, 32, 64, 0.1
PADDED = (8, 16, 32)
NORMS = ("batch norm", "batch norm, mask", "layer norm", "RMS norm")
MODES = ("running statistics", "batch statistics")
# Of the deviation of the outputs: more is a dependence, less is rounding.
DEPENDS, ROUNDING = 0.01, 1e-4


class Found(NamedTuple):
    # By norm and mode: test accuracy in percent, (seeds, PADDED); and the largest change of an
    # output between the shortest and the longest padding, in deviations of the outputs, (seeds,).
    accuracy: dict[tuple[str, str], np.ndarray]
    change: dict[tuple[str, str], np.ndarray]
    # By norm: share of the outputs that are finite where the padding is NaN, in batch statistics.
    finite: dict[str, float]


def normalize(
    x: Array,
    stats: normjax.BatchStats,
    layer: dict[str, Array],
    valid: Array,
    norm: Array,
    train: bool,
) -> tuple[Array, normjax.BatchStats]:
    """The norm of that number in NORMS; x (N, T, C), valid (N, T, 1)."""
    scale, shift = layer["scale"], layer["shift"]

    def batch(mask: Array | None) -> tuple[Array, normjax.BatchStats]:
        return normjax.batch_norm(x, stats, scale, shift, train=train, momentum=0.9, mask=mask)

    choices = (
        lambda: batch(None),
        lambda: batch(valid),
        lambda: (normjax.layer_norm(x, scale, shift), stats),
        lambda: (normjax.rms_norm(x, scale), stats),
    )
    found: tuple[Array, normjax.BatchStats] = jax.lax.switch(norm, choices)
    return found


def logits(
    params: Any, state: Any, rows: Array, lengths: Array, norm: Array, train: bool
) -> tuple[Array, Any]:
    """Twice a causal convolution over the steps, norm, ReLU; then the mean over the valid steps.

    Padding comes last, so a causal convolution carries none of it into a valid step, and the mean
    leaves it out: only the statistics of a norm can.
    """
    valid = (jnp.arange(rows.shape[1]) < lengths[:, None])[..., None]
    x, moved = rows, []
    for layer, stats in zip(params[:-1], state, strict=True):
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        x = jnp.concatenate([before, x], -1) @ layer["weight"]
        x, stats = normalize(x, stats, layer, valid, norm, train)
        x = jax.nn.relu(x)
        moved.append(stats)
    pooled = jnp.sum(jnp.where(valid, x, 0), 1) / lengths[:, None]
    return pooled @ params[-1]["weight"] + params[-1]["bias"], moved


def cut(images: Array, lengths: Array, padded: int, padding: float) -> Array:
    """Rows of images as sequences (N, padded, 8): as many as `lengths` says, then padding."""
    rows = jnp.pad(images[..., 0], ((0, 0), (0, padded - STEPS), (0, 0)))
    return jnp.where((jnp.arange(padded) < lengths[:, None])[..., None], rows, padding)


def init(key: Array) -> Any:
    # A convolution over two steps is a dense layer of the features of both.
    first, second, last = jax.random.split(key, 3)
    layers = dense_layers(first, [2 * STEPS, WIDTH]) + dense_layers(second, [2 * WIDTH, WIDTH])
    return layers + dense_layers(last, [WIDTH, 10])


def trained(params: Any, lengths: Array, key: Array, norm: Array, steps: int) -> tuple[Any, Any]:
    def loss(params: Any, state: Any, images: Array, labels: Array, key: Array) -> Any:
        labels, lengths = labels.T
        rows = cut(images, lengths, PADDED[0], 0)
        y, state = logits(params, state, rows, lengths, norm, train=True)
        return cross_entropy(y, labels), state

    state = [normjax.BatchStats.make(WIDTH)] * 2
    labels = jnp.stack([jnp.asarray(digits().labels), lengths], 1)
    sgd = optax.sgd(RATE)
    done = train(
        loss, params, state, key, steps=steps, batch_size=BATCH, optimizer=sgd, labels=labels
    )
    return done.params, done.state


def random_lengths(seeds: int, count: int, *seed: int) -> Array:
    generators = [np.random.default_rng((number, *seed)) for number in range(seeds)]
    return jnp.stack([each.integers(SHORTEST, STEPS + 1, count) for each in generators])


def measure(options: Options) -> Found:
    steps = 20 if options.smoke else 2000
    data = digits()
    keys = jax.vmap(jax.random.key)(jnp.arange(2 * options.seeds)).reshape(2, -1)
    numbers = jnp.arange(len(NORMS))
    lengths = random_lengths(options.seeds, len(data.labels), 0)
    run = jax.vmap(partial(trained, steps=steps), in_axes=(None, None, None, 0))
    all_seeds = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None)))
    params, state = all_seeds(jax.jit(jax.vmap(init))(keys[0]), lengths, keys[1], numbers)
    lengths = random_lengths(options.seeds, len(data.test_labels), 1)

    @partial(jax.jit, static_argnums=(0, 1))
    def outputs(mode: str, padded: int, padding: float) -> Array:
        """(seeds, norms, images, 10)"""

        def one(params: Any, state: Any, lengths: Array, norm: Array) -> Array:
            rows = cut(jnp.asarray(data.test_images), lengths, padded, padding)
            return logits(params, state, rows, lengths, norm, train=mode == MODES[1])[0]

        norms = jax.vmap(one, in_axes=(0, 0, None, 0))
        return jax.vmap(norms, in_axes=(0, 0, 0, None))(params, state, lengths, numbers)

    right: dict[tuple[str, str], np.ndarray] = {}
    change: dict[tuple[str, str], np.ndarray] = {}
    for mode in MODES:
        by_padding = [np.asarray(outputs(mode, padded, 0.0)) for padded in PADDED]
        for number, norm in enumerate(NORMS):
            found = np.stack([y[:, number] for y in by_padding], 1)
            right[norm, mode] = 100 * (found.argmax(-1) == data.test_labels).mean(-1)
            shortest, longest = found[:, 0], found[:, -1]
            change[norm, mode] = np.abs(longest - shortest).max((1, 2)) / shortest.std((1, 2))
    of_nan = np.asarray(outputs(MODES[1], PADDED[0], np.nan))
    finite = {norm: float(np.isfinite(of_nan[:, i]).mean()) for i, norm in enumerate(NORMS)}
    return Found(right, change, finite)


def conclude(found: Found) -> Conclusion:
    largest = {key: float(values.max()) for key, values in found.change.items()}
    depends = [largest["batch norm", mode] > DEPENDS for mode in MODES]
    others = all(largest[norm, mode] < ROUNDING for norm in NORMS[1:] for mode in MODES)
    plain = found.accuracy["batch norm", MODES[1]].mean(0)
    masked = found.accuracy["batch norm, mask", MODES[1]].mean(0)
    rows = [
        [
            norm,
            mode if "batch" in norm else "none",
            *(spread(values, 1) for values in found.accuracy[norm, mode].T),
            f"{largest[norm, mode]:.2g}",
            f"{100 * found.finite[norm]:.0f} %" if mode == MODES[1] else "",
        ]
        for norm in NORMS
        for mode in (MODES if "batch" in norm else MODES[1:])
    ]
    factor = largest["batch norm", MODES[1]]
    running = "changes as well" if depends[0] else "does not change"
    return Conclusion(
        held="yes" if all(depends) and others else "partly" if any(depends) and others else "no",
        number=f"accuracy {plain[0]:.0f} % → {plain[-1]:.0f} %, with a mask {masked[-1]:.0f} %",
        text=(
            f"Rows of digits are sequences of {SHORTEST} to {STEPS} steps, padded to {PADDED[0]} "
            f"in training. Tested with the statistics of the batch, padding to {PADDED[-1]} "
            f"changes outputs by up to {factor:.1f} deviations and accuracy from {plain[0]:.1f} % "
            f"to {plain[-1]:.1f} % without a mask; with one it stays at {masked[-1]:.1f} %, and "
            f"where the padding is NaN, {100 * found.finite['batch norm, mask']:.0f} % of the "
            f"outputs are finite. With running statistics what batch norm without a mask "
            f"returns for a sequence {running} with its padding, and accuracy is "
            f"{found.accuracy['batch norm', MODES[0]].mean():.1f} %. Layer norm and RMS norm "
            f"{'are not affected' if others else 'change by more than rounding'}."
        ),
        header=[
            "norm", "statistics in the test", *(f"accuracy, %, padded to {n}" for n in PADDED),
            "largest change of an output, deviations", "finite outputs, padding NaN",
        ],
        rows=rows,
    )  # fmt: skip


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for norm, size in zip(NORMS, (6, 6, 10, 6), strict=True):
        values = found.accuracy[norm, MODES[1]]
        (line,) = left.plot(PADDED, values.mean(0), marker="o", ms=size, label=norm)
        left.fill_between(PADDED, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
    running = found.accuracy["batch norm", MODES[0]].mean(0)
    left.plot(PADDED, running, color="C0", ls=":", label="batch norm, running statistics")
    left.set_xscale("log", base=2)
    left.set_xticks(PADDED, [str(n) for n in PADDED])
    left.set(xlabel="padded to, steps (8 in training)", ylabel="test accuracy, %", ylim=(40, 95))
    left.legend(loc="lower left")
    left.set_title("Accuracy, statistics of the batch")
    for number, norm in enumerate(NORMS):
        change = float(found.change[norm, MODES[1]].max())
        right.barh(number, max(change, 1e-8))
        right.text(max(1.5 * change, 1.5e-8), number, f"{change:.2g}", va="center")
    right.set_yticks(range(len(NORMS)), NORMS)
    right.invert_yaxis()
    right.set(xscale="log", xlim=(1e-8, 100), xlabel="deviations of the outputs")
    right.grid(visible=False, axis="y")
    right.set_title(f"Largest change, {PADDED[0]} to {PADDED[-1]} steps")
    figure.suptitle(f"Padding of {PADDED[0]} → {PADDED[-1]} steps: {conclude(found).number}")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw, seeds=5)
