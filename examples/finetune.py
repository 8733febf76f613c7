"""Adapt a trained network to another domain with the tools for batch norm.

A residual network that uses only Flax is trained on handwritten digits, and then tested on
inverted, noisy and faded ones. The script prints the report of `surgery.diagnose` and the accuracy
of each method: statistics recomputed from images without labels, and fine-tuning on single images
with batch norm unchanged, frozen, or converted to group norm. Then it folds the batch norms and
measures the time of single images.

    python examples/finetune.py             # about a minute on two cores
    python examples/finetune.py --batch-size 4    # batch norm works at this batch size
    python examples/finetune.py --smoke     # a short run of a few seconds

`python examples/nnx_finetune.py` does the same for a network of flax.nnx.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from _common import STYLE, check_writable
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from normjax import surgery


class ResidualNet(nn.Module):
    """The norm is a field, a factory of layers, so that another norm can replace it."""

    norm: Any
    channels: int = 32

    @nn.compact
    def __call__(self, images, train):
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        norm = partial(self.norm, train)
        x = nn.relu(norm()(conv(self.channels)(images)))
        for features, strides in ((self.channels, 1), (2 * self.channels, 2)):
            y = nn.relu(norm()(conv(features, strides=strides)(x)))
            y = norm()(conv(features)(y))
            if strides > 1:
                x = norm()(conv(features, kernel_size=(1, 1), strides=strides)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def batch_norm(train):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)


def group_norm(train):
    return nn.GroupNorm(num_groups=8)


MODEL, TWIN = ResidualNet(batch_norm), ResidualNet(group_norm)

DOMAINS = {
    "inverted": lambda images, rng: 1 - images,
    "noisy": lambda images, rng: images + rng.normal(0, 0.5, images.shape),
    "faded": lambda images, rng: 0.5 + 0.2 * images,
}

METHODS = (
    "as it is",
    "recompute",
    "fine-tuned, batch norm",
    "fine-tuned, recomputed and frozen",
    "fine-tuned, group norm",
)


def parse(argv, doc, picture):
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12, help="epochs on the digits")
    parser.add_argument("--steps", type=int, default=300, help="fine-tuning steps in each domain")
    parser.add_argument("--batch-size", type=int, default=1, help="images per fine-tuning step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    parser.add_argument("--smoke", action="store_true", help="a short run, accuracy is not checked")
    args = parser.parse_args(argv)
    for name in ("epochs", "steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.smoke:
        args.epochs, args.steps = 2, 5
    args.picture = args.out / picture
    check_writable(parser, args.picture)
    return args


def load_data(seed):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return train_test_split(images, labels, test_size=360, random_state=seed, stratify=labels)


def call(variables, images, *, train, mutable=False):
    return MODEL.apply(variables, images, train, mutable=mutable)


def batches(images, size=128):
    """Full batches, of the size used in training."""
    return [images[i : i + size] for i in range(0, len(images) - size + 1, size)]


def start(args, images):
    """The network before training: its model and its variables."""
    return MODEL, MODEL.init(jax.random.key(args.seed), images[:1], train=False)


def fit(network, images, labels, *, steps, size, rate, rng, title, tool=lambda apply: apply):
    """Trains the model; `tool` may wrap its apply function."""
    model, variables = network
    apply = tool(model.apply)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(variables, state, images, labels):
        def loss(params):
            logits, updates = apply(
                {**variables, "params": params}, images, True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
        change, state = optimizer.update(gradient, state)
        params = optax.apply_updates(variables["params"], change)
        return {**variables, "params": params, **updates}, state

    state = optimizer.init(variables["params"])
    for _ in tqdm(range(steps), desc=title, unit="step", file=sys.stdout, mininterval=0.5):
        chosen = rng.choice(len(images), size, replace=False)
        variables, state = step(variables, state, images[chosen], labels[chosen])
    return model, variables


@partial(jax.jit, static_argnums=0)
def predict(model, variables, images):
    return model.apply(variables, images, train=False)


def accuracy(network, images, labels):
    return float(np.mean(np.argmax(predict(*network, images), -1) == labels))


def adapt(network, images, tune):
    """The network adapted by each method, and the report on the unchanged network."""
    _, variables = network
    report = surgery.diagnose(call, variables, batches(images))
    recomputed = surgery.recompute(call, variables, batches(images))
    converted = surgery.convert(recomputed, num_groups=8)
    return report, {
        METHODS[0]: network,
        METHODS[1]: (MODEL, recomputed),
        METHODS[2]: tune(network, title="  batch norm"),
        METHODS[3]: tune((MODEL, recomputed), title="  frozen", tool=surgery.freeze),
        METHODS[4]: tune((TWIN, converted), title="  group norm"),
    }


def serving(network, images):
    """Functions of one image and their variables, with batch norm and folded."""
    _, variables = network
    serve, folded, report = surgery.fold(
        lambda variables, x: MODEL.apply(variables, x, train=False), variables, images[:1]
    )
    print(f"\n{report}")
    plain = surgery.guard(jax.jit(lambda variables, x: MODEL.apply(variables, x, train=False)))
    return {"batch norm": (plain, variables), "folded": (jax.jit(serve), folded)}


def time_single_images(ways, images):
    """Milliseconds for one image with each function, and the largest difference of outputs."""
    outputs = {name: np.asarray(f(v, images[:1])) for name, (f, v) in ways.items()}
    apart = np.max(np.abs(outputs["batch norm"] - outputs["folded"]))
    times = {name: [] for name in ways}
    for i in range(300):  # Interleaved, so that changes in machine load affect both.
        for name, (f, v) in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(f(v, images[i : i + 1]))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}, float(apart)


def draw(path, examples, table):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(STYLE)
    fig = plt.figure(figsize=(11, 4), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 3.4))
    for axes, (name, images) in zip(
        left.subplots(len(examples), 1).flat, examples.items(), strict=True
    ):
        axes.imshow(np.hstack(images[:4, ..., 0]), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    axes = right.subplots()
    width = 0.8 / len(METHODS)
    for i, method in enumerate(METHODS):
        values = [table[domain][method] for domain in table]
        places = np.arange(len(table)) + (i - (len(METHODS) - 1) / 2) * width
        bars = axes.bar(places, values, width * 0.92, label=method, color=f"C{(3, 0, 1, 2, 4)[i]}")
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7, padding=1)
    axes.set_xticks(range(len(table)), table)
    axes.set(ylim=(0, 1.08), title="accuracy on test images of another domain")
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None, framework=None, doc=__doc__, picture="finetune.png"):
    """Runs the example; `framework` has start, fit, accuracy, adapt and serving."""
    framework = framework or sys.modules[__name__]
    args = parse(argv, doc, picture)
    x_train, x_test, y_train, y_test = load_data(args.seed)
    rng = np.random.default_rng(args.seed)
    network = framework.fit(
        framework.start(args, x_train), x_train, y_train,
        steps=args.epochs * len(x_train) // 128, size=128, rate=3e-3, rng=rng, title="training",
    )  # fmt: skip
    home = framework.accuracy(network, x_test, y_test)
    print(f"\ntest accuracy on the domain of training: {home:.4f}")

    table, examples = {}, {"digits": x_test}
    domains = dict(list(DOMAINS.items())[:1]) if args.smoke else DOMAINS
    for domain, change in domains.items():
        changed = [np.float32(change(images, rng)) for images in (x_train, x_test)]
        examples[domain] = changed[1]
        print(f"\n{domain}:")

        def tune(network, images=changed[0], **options):
            fresh = np.random.default_rng(args.seed)
            size = dict(steps=args.steps, size=args.batch_size)
            return framework.fit(network, images, y_train, rate=1e-3, rng=fresh, **size, **options)

        report, results = framework.adapt(network, changed[0], tune)
        table[domain] = {
            name: framework.accuracy(result, changed[1], y_test) for name, result in results.items()
        }
        print(f"\n{report}")

    width = max(map(len, METHODS))
    print(f"\n{'accuracy':<{width}}  " + "  ".join(f"{domain:>8}" for domain in table))
    for method in METHODS:
        row = "  ".join(f"{table[domain][method]:8.4f}" for domain in table)
        print(f"{method:<{width}}  {row}")

    times, apart = time_single_images(framework.serving(network, x_test), x_test)
    print(
        f"one image: {times['batch norm']:.3f} ms with batch norm, {times['folded']:.3f} ms "
        f"folded, {times['batch norm'] / times['folded']:.2f} times as fast; outputs differ by "
        f"{apart:.1e}"
    )

    draw(args.picture, examples, table)
    print(f"\npicture: {args.picture}")

    assert apart < 1e-3, "folding must not change the outputs"
    if not args.smoke:
        mean = {name: np.mean([row[name] for row in table.values()]) for name in METHODS}
        # Not for inverted images: their filters are wrong, so new statistics may not help.
        for domain in ("noisy", "faded"):
            assert table[domain]["recompute"] > table[domain]["as it is"] + 0.05
        if args.batch_size == 1:
            assert mean[METHODS[3]] > mean[METHODS[2]], "frozen must be better on single images"
    return table


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; nothing was written")
