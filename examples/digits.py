"""Train a small residual network on handwritten digits over four devices, and serve it.

The script shows batch norm in training and in evaluation. Batch statistics are shared over the
devices (`axis_name="batch"`). The last batch does not fill the devices, so it is padded and masked.
Evaluation uses running statistics. The cost of a common mistake, serving in training mode, is
measured.

    python examples/digits.py             # about a minute on two cores
    python examples/digits.py --smoke     # a short run of a few seconds
"""

import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import (
    STYLE,
    accuracy,
    batches,
    check_serving,
    check_statistics,
    check_writable,
    load_data,
    make_optimizer,
    make_parser,
    parse,
    pick_devices,
)
from tqdm import tqdm

import normjax.linen


class ResidualNet(nn.Module):
    """Convolution -> batch norm -> ReLU, in the two orders of residual blocks."""

    momentum: float
    axis_name: str | None = "batch"
    channels: int = 32

    @nn.compact
    def __call__(self, images, train, mask=None):
        # Convolutions need no bias: batch norm subtracts the mean and has its own bias.
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False)

        def norm(x):
            layer = normjax.linen.BatchNorm(momentum=self.momentum, axis_name=self.axis_name)
            return layer(x, train=train, mask=mask)

        x = nn.relu(norm(conv(self.channels)(images)))

        # Post-activation (He et al. 2015): the activation follows the sum.
        y = nn.relu(norm(conv(self.channels)(x)))
        x = nn.relu(x + norm(conv(self.channels)(y)))

        # Pre-activation (He et al. 2016): nothing follows the sum. Half the size, double channels.
        y = nn.relu(norm(x))
        shortcut = conv(2 * self.channels, kernel_size=(1, 1), strides=2)(y)
        y = nn.relu(norm(conv(2 * self.channels, strides=2)(y)))
        x = shortcut + conv(2 * self.channels)(y)

        return nn.Dense(10)(nn.relu(norm(x)).mean(axis=(1, 2)))


def make_loss(model):
    """The cross entropy of the real images, summed and divided by `total`."""

    def loss_fn(params, batch_stats, images, labels, real, total):
        variables = {"params": params, "batch_stats": batch_stats}
        mask = real[:, None, None, None]
        logits, updates = model.apply(
            variables, images, train=True, mask=mask, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = jnp.sum(real & (logits.argmax(-1) == labels))
        return jnp.where(real, losses, 0).sum() / total, (updates["batch_stats"], hits)

    return loss_fn


def make_step(model, optimizer):
    """A training step on one device, with its shard of the batch."""
    loss_fn = make_loss(model)

    def step(state, images, labels, real):
        params, batch_stats, opt_state = state
        # Divide by the number of images on all devices: the sum over devices is then the mean.
        total = jax.lax.psum(real.sum(), "batch")
        (loss, (batch_stats, hits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch_stats, images, labels, real, total
        )
        loss, hits, grads = jax.lax.psum((loss, hits, grads), "batch")
        params, opt_state = descend(optimizer, params, opt_state, grads)
        return (params, batch_stats, opt_state), (loss, hits)

    return step


def mapped_step(model, optimizer, devices):
    """The step on all devices: each has its own copy of the state and a shard of the batch."""
    step = jax.pmap(
        make_step(model, optimizer), axis_name="batch", devices=devices, donate_argnums=0
    )

    def share(leaf):
        return leaf.reshape(len(devices), -1, *leaf.shape[1:])

    return lambda state, *batch: step(state, *map(share, batch))


def descend(optimizer, params, opt_state, grads):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def initial_state(variables, optimizer):
    params = variables["params"]
    return params, variables["batch_stats"], optimizer.init(params)


def on_each_device(state, devices):
    # The axis has the same name as in the step; another name would compile the step again.
    return jax.pmap(lambda _: state, "batch", devices=devices)(np.arange(len(devices)))


def train(args, model, variables, data, devices):
    x_train, x_test, y_train, y_test = data
    steps = args.epochs * -(-len(x_train) // args.batch_size)
    optimizer = make_optimizer(steps)
    state = initial_state(variables, optimizer)
    state = on_each_device(state, devices)
    step = mapped_step(model, optimizer, devices)
    rng = np.random.default_rng(args.seed)
    history = {"loss": [], "train": [], "test": []}

    with tqdm(total=steps, unit="step", desc="training", file=sys.stdout, mininterval=0.5) as bar:
        for _ in range(args.epochs):
            hits = 0
            for batch in batches(x_train, y_train, args.batch_size, rng):
                state, (loss, hit) = step(state, *batch)
                history["loss"].append(float(loss[0]))
                hits += int(hit[0])
                bar.update()
            params, batch_stats, _ = jax.tree.map(lambda leaf: np.asarray(leaf)[0], state)
            served = {"params": params, "batch_stats": batch_stats}
            history["train"].append(hits / len(x_train))
            history["test"].append(accuracy(predict(model, served, x_test), y_test))
            bar.set_postfix(loss=f"{history['loss'][-1]:.4f}", test=f"{history['test'][-1]:.4f}")
    return state, served, history


@partial(jax.jit, static_argnums=0)
def predict(model, variables, images):
    return model.apply(variables, images, train=False)


@partial(jax.jit, static_argnums=0)
def predict_in_training(model, variables, images):
    """The mistake: logits with the batch statistics of `images`."""
    local = model.clone(axis_name=None)
    logits, _ = local.apply(variables, images, train=True, mutable=["batch_stats"])
    return logits


def population_statistics(model, variables, images):
    """Statistics of all training images as one batch: momentum 0 keeps no older statistics."""
    whole = model.clone(axis_name=None, momentum=0.0)
    _, updates = jax.jit(partial(whole.apply, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    return updates["batch_stats"]


def draw(path, history, running, population):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(STYLE)
    fig, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    epochs = np.arange(1, len(history["test"]) + 1)
    axes[0].plot(
        np.linspace(0, epochs[-1], len(history["loss"])), history["loss"], color="C0", lw=1
    )
    axes[0].set(title="training loss", xlabel="epoch", ylabel="cross entropy", yscale="log")
    axes[1].plot(epochs, history["train"], "o-", ms=3, label="training images, train=True")
    axes[1].plot(epochs, history["test"], "o-", ms=3, label="test images, train=False")
    axes[1].axhline(0.98, color="gray", lw=0.8, ls="--")
    axes[1].set(title="accuracy", xlabel="epoch", ylim=(0.9, 1.002))
    axes[1].legend(loc="lower right", fontsize=8)
    for ax, name, title, scale in (
        (axes[2], "mean", "mean", "linear"),
        (axes[3], "var", "variance", "log"),
    ):
        for layer in sorted(running):
            ax.plot(
                population[layer][name], running[layer][name], "o", ms=3, alpha=0.7, label=layer
            )
        ax.axline((1, 1), slope=1, color="gray", lw=0.8, ls="--")
        ax.set(xscale=scale, yscale=scale, title=f"running and population {title}")
        ax.set(xlabel="population (all training images)", ylabel="running")
    axes[2].legend(fontsize=7)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None):
    parser = make_parser(__doc__, epochs=20)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    args = parse(parser, argv)
    picture = args.out / "digits.png"
    check_writable(parser, picture)
    devices = pick_devices(args.devices)
    data = load_data(args.seed)
    x_train, x_test, _, y_test = data
    print(f"data: {len(x_train)} training and {len(x_test)} test images of 8 x 8 pixels")

    model = ResidualNet(args.momentum)
    variables = model.init(jax.random.key(args.seed), x_train[:1], train=False)
    start = time.perf_counter()
    state, served, history = train(args, model, variables, data, devices)
    print(f"training took {time.perf_counter() - start:.0f} s")

    spread = max(
        float(np.ptp(np.asarray(leaf), axis=0).max()) for leaf in jax.tree.leaves(state[1])
    )
    print(f"running statistics, largest difference between devices: {spread}")
    assert spread == 0, "devices must hold the same statistics"

    population = population_statistics(model, served, x_train)
    draw(picture, history, served["batch_stats"], population)
    print(f"picture: {picture}")
    check_statistics(args, served["batch_stats"], population)

    serve = partial(predict, model, served)
    serve_in_training = partial(predict_in_training, model, served)
    return check_serving(args, serve, serve_in_training, x_test, y_test)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; nothing was written")
