"""Train a small residual network on handwritten digits over four devices, and serve it.

The whole life of batch normalization in one script: batch statistics are shared over the devices
(`axis_name="batch"`), a last batch that does not fill the devices is padded and masked, running
statistics are kept for evaluation, and the famous mistake, serving in training mode, is measured.

    python examples/digits.py             # about a minute on two cores
    python examples/digits.py --smoke     # a few seconds, to see that it runs
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import normjax.linen


class ResidualNet(nn.Module):
    """Convolution -> batch norm -> ReLU, in both orders that residual blocks come in."""

    momentum: float
    axis_name: str | None = "batch"
    channels: int = 32

    @nn.compact
    def __call__(self, images, train, mask=None):
        # The convolutions need no bias: batch norm subtracts the mean and has a bias of its own.
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False)

        def norm(x):
            layer = normjax.linen.BatchNorm(momentum=self.momentum, axis_name=self.axis_name)
            return layer(x, train=train, mask=mask)

        x = nn.relu(norm(conv(self.channels)(images)))

        # Post-activation (He et al. 2015): the sum is activated.
        y = nn.relu(norm(conv(self.channels)(x)))
        x = nn.relu(x + norm(conv(self.channels)(y)))

        # Pre-activation (He et al. 2016): the sum is left alone. Half the size, twice the channels.
        y = nn.relu(norm(x))
        shortcut = conv(2 * self.channels, kernel_size=(1, 1), strides=2)(y)
        y = nn.relu(norm(conv(2 * self.channels, strides=2)(y)))
        x = shortcut + conv(2 * self.channels)(y)

        return nn.Dense(10)(nn.relu(norm(x)).mean(axis=(1, 2)))


def make_parser(doc, epochs):
    """The options that every example of this model has."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=epochs, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images in a step, all devices")
    add("--devices", type=int, default=4, help="how many devices share a batch")
    add("--seed", type=int, default=0)
    add("--momentum", type=float, default=0.9, help="of the running statistics")
    add("--smoke", action="store_true", help="two epochs, and no claim on accuracy")
    return parser


def parse(parser, argv):
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "devices"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.batch_size % args.devices:
        parser.error(
            f"--batch-size {args.batch_size} must be a multiple of --devices {args.devices}"
        )
    if args.smoke:
        args.epochs = 2
    return args


def check_writable(parser, path):
    """Makes the folder of the file, and stops before any work if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.exists()
        path.open("ab").close()
        if not known:
            path.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        parser.error(f"--out {path.parent}: cannot write {path}: {reason}. Name another folder.")


def pick_devices(count):
    """The machine's own devices if there are enough, otherwise simulated ones."""
    # Must be said before JAX starts; it has no effect on accelerators.
    jax.config.update("jax_num_cpu_devices", count)
    own = jax.devices()
    if own[0].platform != "cpu" and len(own) >= count:
        print(f"devices: {count} of this machine's {len(own)} ({own[0].device_kind})")
        return own[:count]
    print(f"devices: {count}, simulated on the CPU")
    return jax.devices("cpu")[:count]


def load_data(seed):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return train_test_split(images, labels, test_size=360, random_state=seed, stratify=labels)


def batches(images, labels, size, rng):
    """Shuffled batches of one size; the last one is padded, and a mask tells what is real."""
    order = rng.permutation(len(images))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        real = np.arange(size) < len(chosen)
        padded = np.resize(chosen, size)
        yield images[padded], labels[padded], real


def make_loss(model):
    """Cross entropy of the real images, as a part of the mean over `total` images."""

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
    """One training step on one device, given its share of the batch."""
    loss_fn = make_loss(model)

    def step(state, images, labels, real):
        params, batch_stats, opt_state = state
        # Divided by the images of all devices, so that the sum over devices is the mean.
        total = jax.lax.psum(real.sum(), "batch")
        (loss, (batch_stats, hits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch_stats, images, labels, real, total
        )
        loss, hits, grads = jax.lax.psum((loss, hits, grads), "batch")
        params, opt_state = descend(optimizer, params, opt_state, grads)
        return (params, batch_stats, opt_state), (loss, hits)

    return step


def mapped_step(model, optimizer, devices):
    """The step on all devices: a state for each of them, and a batch that is cut into shares."""
    step = jax.pmap(
        make_step(model, optimizer), axis_name="batch", devices=devices, donate_argnums=0
    )

    def share(leaf):
        return leaf.reshape(len(devices), -1, *leaf.shape[1:])

    return lambda state, *batch: step(state, *map(share, batch))


def descend(optimizer, params, opt_state, grads):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def make_optimizer(steps):
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10 + 1, steps)
    return optax.adamw(schedule, weight_decay=1e-2, mask=decay_mask)


def initial_state(variables, optimizer):
    params = variables["params"]
    return params, variables["batch_stats"], optimizer.init(params)


def on_each_device(state, devices):
    # The axis has the name that it has in the step: what lies along another one is a new program.
    return jax.pmap(lambda _: state, "batch", devices=devices)(np.arange(len(devices)))


def decay_mask(params):
    """Weight decay for kernels alone: it would pull scales and biases away from their purpose."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


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


def accuracy(logits, labels):
    return float(np.mean(np.argmax(logits, -1) == labels))


def serve_by_mistake(model, variables, images, labels, size):
    """Accuracy when the serving call says train=True, on batches of `size`."""
    local = model.clone(axis_name=None)

    @jax.jit
    def serve(batch):
        logits, _ = local.apply(variables, batch, train=True, mutable=["batch_stats"])
        return logits

    grouped = images[: len(images) // size * size].reshape(-1, size, *images.shape[1:])
    logits = np.concatenate([serve(batch) for batch in grouped])
    return accuracy(logits, labels[: len(logits)])


def population_statistics(model, variables, images):
    """Statistics of all training images taken as one batch: momentum 0 forgets all else."""
    whole = model.clone(axis_name=None, momentum=0.0)
    _, updates = jax.jit(partial(whole.apply, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    return updates["batch_stats"]


def draw(path, history, running, population):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
        ax.set(xscale=scale, yscale=scale, title=f"running against population {title}")
        ax.set(xlabel="population (all training images)", ylabel="running")
    axes[2].legend(fontsize=7)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None):
    parser = make_parser(__doc__, epochs=20)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
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

    logits = predict(model, served, x_test)
    test_accuracy = accuracy(logits, y_test)
    print(f"\ntest accuracy with running statistics (train=False): {test_accuracy:.4f}")

    spread = max(
        float(np.ptp(np.asarray(leaf), axis=0).max()) for leaf in jax.tree.leaves(state[1])
    )
    print(f"running statistics, largest difference between devices: {spread}")

    alone = np.concatenate([predict(model, served, x_test[i : i + 1]) for i in range(32)])
    apart = float(np.max(np.abs(alone - logits[:32])))
    print(f"logits alone and in a batch of {len(x_test)}, largest difference: {apart:.1e}")

    print("\nthe famous mistake, serving with train=True:")
    mistakes = {size: serve_by_mistake(model, served, x_test, y_test, size) for size in (1, 2, 8)}
    for size, value in mistakes.items():
        print(f"  batches of {size}: accuracy {value:.4f}")

    draw(picture, history, served["batch_stats"], population_statistics(model, served, x_train))
    print(f"\npicture: {picture}")

    assert spread == 0, "devices must hold the same statistics"
    assert apart < 1e-4, "a prediction must not depend on the batch that it comes in"
    if not args.smoke:
        assert test_accuracy >= 0.98, f"expected an accuracy of 0.98, got {test_accuracy:.4f}"
        assert mistakes[1] < test_accuracy, "serving in training mode on single images must cost"
    return test_accuracy


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; nothing was written")
