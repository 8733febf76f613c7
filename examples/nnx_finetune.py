"""examples/finetune.py for a network of flax.nnx.

A residual network that uses only Flax is trained on handwritten digits, and then tested on
inverted, noisy and faded ones. The tools take the model and return a copy: `surgery.freeze(model)`
is a frozen copy, and `model.train()` does not unfreeze it.

    python examples/nnx_finetune.py             # about a minute on two cores
    python examples/nnx_finetune.py --smoke     # a short run of a few seconds
"""

import sys
from functools import partial

import finetune
import jax
import numpy as np
import optax
from finetune import METHODS, batches
from flax import nnx
from tqdm import tqdm

from normjax import surgery


class Block(nnx.Module):
    """Two convolutions and a shortcut; if the size changes, the shortcut has a convolution."""

    def __init__(self, before, features, strides, rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, features, momentum=0.9, rngs=rngs)
        self.conv1, self.norm1 = conv(before, features, strides=strides), norm()
        self.conv2, self.norm2 = conv(features, features), norm()
        self.around = nnx.List([])
        if strides > 1:
            projection = conv(before, features, kernel_size=(1, 1), strides=strides)
            self.around = nnx.List([projection, norm()])

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        for layer in self.around:
            x = layer(x)
        return nnx.relu(x + y)


class ResidualNet(nnx.Module):
    """The network of finetune.py."""

    def __init__(self, rngs, channels=32):
        self.stem = nnx.Conv(1, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        shapes = (channels, channels, 1), (channels, 2 * channels, 2)
        self.blocks = nnx.List([Block(*shape, rngs) for shape in shapes])
        self.head = nnx.Linear(2 * channels, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def start(args, images):
    """The network before training."""
    return ResidualNet(nnx.Rngs(args.seed))


def fit(model, images, labels, *, steps, size, rate, rng, title):
    """Trains a copy; a frozen layer stays frozen."""
    model = nnx.clone(model)
    model.train()
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss(model):
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in tqdm(range(steps), desc=title, unit="step", file=sys.stdout, mininterval=0.5):
        chosen = rng.choice(len(images), size, replace=False)
        step(model, optimizer, images[chosen], labels[chosen])
    return model


@nnx.jit
def predict(model, images):
    return model(images)


def accuracy(model, images, labels):
    served = nnx.clone(model)
    served.eval()
    return float(np.mean(np.argmax(predict(served, images), -1) == labels))


def adapt(model, images, tune):
    """The network adapted by each method, and the report on the unchanged network."""
    report = surgery.diagnose(model, batches(images))
    recomputed = surgery.recompute(model, batches(images))
    return report, {
        METHODS[0]: model,
        METHODS[1]: recomputed,
        METHODS[2]: tune(model, title="  batch norm"),
        METHODS[3]: tune(surgery.freeze(recomputed), title="  frozen"),
        METHODS[4]: tune(surgery.convert(recomputed, num_groups=8), title="  group norm"),
    }


def serving(model, images):
    """Functions of one image and their variables, with batch norm and folded."""
    serve, folded, report = surgery.fold(model, images[:1])
    print(f"\n{report}")
    guarded = surgery.guard(model)
    guarded.eval()
    graphdef, state = nnx.split(guarded)
    plain = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return {"batch norm": (plain, state), "folded": (jax.jit(serve), folded)}


if __name__ == "__main__":
    try:
        finetune.main(None, sys.modules[__name__], __doc__, "nnx_finetune.png")
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; nothing was written")
