"""Code that the examples for linen and NNX share.

Options, data, batches, the optimizer, and the checks of a trained network.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from normjax import surgery

# The matplotlib style of all plots.
STYLE = Path(__file__).parents[1] / "docs" / "normjax.mplstyle"


def make_parser(doc, epochs):
    """A parser with the options that all examples of this model share."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=epochs, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images per step on all devices")
    add("--devices", type=int, default=4, help="number of devices")
    add("--seed", type=int, default=0)
    add("--momentum", type=float, default=0.9, help="of the running statistics")
    add("--smoke", action="store_true", help="two epochs, accuracy is not checked")
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
    """Creates the folder of the file. Exits before any work if the file cannot be written."""
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
    """The devices of the machine if there are enough, otherwise simulated ones."""
    # Must be set before JAX initializes; it has no effect on accelerators.
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
    """Shuffled batches of one size. The last one is padded; a mask marks the real images."""
    order = rng.permutation(len(images))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        real = np.arange(size) < len(chosen)
        padded = np.resize(chosen, size)
        yield images[padded], labels[padded], real


def make_optimizer(steps):
    """Adam with weight decay on kernels only, since decay would shrink the scales of norms."""
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10 + 1, steps)
    return optax.adamw(schedule, weight_decay=1e-2, mask=surgery.decay_mask)


def accuracy(logits, labels):
    return float(np.mean(np.argmax(logits, -1) == labels))


def check_serving(args, serve, serve_in_training, images, labels):
    """Prints the test accuracy, in evaluation and by mistake in training mode, and checks it.

    Args:
        serve, serve_in_training: from images to logits, in evaluation and in training mode.

    Returns:
        The accuracy of `serve`.
    """
    logits = serve(images)
    right = accuracy(logits, labels)
    print(f"\ntest accuracy with running statistics: {right:.4f}")

    alone = np.concatenate([serve(images[i : i + 1]) for i in range(32)])
    apart = float(np.max(np.abs(alone - logits[:32])))
    print(f"logits alone and in a batch of {len(images)}, largest difference: {apart:.1e}")

    print("\na common mistake, serving in training mode:")
    mistakes = {}
    for size in (1, 2, 8):
        mistakes[size] = accuracy_in_batches(serve_in_training, images, labels, size)
        print(f"  batches of {size}: accuracy {mistakes[size]:.4f}")
    order = np.argsort(labels, kind="stable")
    by_class = accuracy_in_batches(serve_in_training, images[order], labels[order], 8)
    print(f"  batches of 8, sorted by label: accuracy {by_class:.4f}")

    assert apart < 1e-4, "a prediction must not depend on other images of its batch"
    if not args.smoke:
        assert right >= 0.98, f"expected an accuracy of 0.98, got {right:.4f}"
        assert mistakes[1] < right, "training mode must reduce the accuracy on single images"
        assert by_class < right, "training mode must reduce the accuracy on sorted images"
    return right


def accuracy_in_batches(serve, images, labels, size):
    grouped = images[: len(images) // size * size].reshape(-1, size, *images.shape[1:])
    logits = np.concatenate([serve(batch) for batch in grouped])
    return accuracy(logits, labels[: len(logits)])


def check_statistics(args, running, population):
    """Compares running statistics with those of the population; asserts that they are close.

    Args:
        running, population: by layer, mean and var of each feature. The population is all training
            images as one batch.
    """
    shifts, ratios = {}, {}
    for layer, whole in population.items():
        deviation = np.sqrt(whole["var"])
        shifts[layer] = np.max(np.abs(running[layer]["mean"] - whole["mean"]) / deviation)
        ratios[layer] = np.asarray(running[layer]["var"] / whole["var"])

    print(f"\n{'running and population':28}{'mean, in deviations':>22}{'variance, ratio':>22}")
    for layer in sorted(population):
        low, high = ratios[layer].min(), ratios[layer].max()
        print(f"  {layer:26}{shifts[layer]:22.3f}{low:14.2f} to {high:4.2f}")

    if not args.smoke:
        far = max(shifts.values())
        assert far < 0.1, f"running means are off by up to {far:.3f} standard deviations"
        far = np.exp(max(np.max(np.abs(np.log(ratio))) for ratio in ratios.values()))
        assert far < 1.2, f"running variances are off by a factor of up to {far:.2f}"
