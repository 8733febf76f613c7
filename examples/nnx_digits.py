"""Train the network of digits.py in Flax NNX over four devices, resume it, and serve it.

The code is that for one device: it names no axis. Batches are sharded by rows, the network is
replicated, and under nnx.jit batch statistics are those of all rows. The last batch is padded and
masked. Halfway the training is saved with Orbax. A second network resumes from there and must end
with the same values as the first.

    python examples/nnx_digits.py             # about a minute on two cores
    python examples/nnx_digits.py --smoke     # a short run of a few seconds
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _common import (
    batches,
    check_serving,
    check_statistics,
    load_data,
    make_optimizer,
    make_parser,
    parse,
    pick_devices,
)
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import normjax.nnx


class ResidualNet(nnx.Module):
    """Convolution -> batch norm -> ReLU, in the two orders of residual blocks.

    Layers have the same numbers as in linen, in digits.py.
    """

    def __init__(self, momentum, channels=32, *, rngs):
        # Convolutions need no bias: batch norm subtracts the mean and has its own bias.
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        norm = partial(normjax.nnx.BatchNorm, momentum=momentum, rngs=rngs)

        self.conv0, self.norm0 = conv(1, channels), norm(channels)

        self.conv1, self.norm1 = conv(channels, channels), norm(channels)
        self.conv2, self.norm2 = conv(channels, channels), norm(channels)

        self.norm3 = norm(channels)
        self.conv3 = conv(channels, 2 * channels, kernel_size=(1, 1), strides=2)
        self.conv4, self.norm4 = conv(channels, 2 * channels, strides=2), norm(2 * channels)
        self.conv5 = conv(2 * channels, 2 * channels)

        self.norm5 = norm(2 * channels)
        self.dense0 = nnx.Linear(2 * channels, 10, rngs=rngs)

    def __call__(self, images, mask=None):
        x = nnx.relu(self.norm0(self.conv0(images), mask=mask))

        # Post-activation (He et al. 2015): the activation follows the sum.
        y = nnx.relu(self.norm1(self.conv1(x), mask=mask))
        x = nnx.relu(x + self.norm2(self.conv2(y), mask=mask))

        # Pre-activation (He et al. 2016): nothing follows the sum. Half the size, double channels.
        y = nnx.relu(self.norm3(x, mask=mask))
        shortcut = self.conv3(y)
        y = nnx.relu(self.norm4(self.conv4(y), mask=mask))
        x = shortcut + self.conv5(y)

        return self.dense0(nnx.relu(self.norm5(x, mask=mask)).mean(axis=(1, 2)))


def loss_fn(model, images, labels, real):
    """The mean cross entropy of the real images."""
    logits = model(images, mask=real[:, None, None, None])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses, where=real), jnp.sum(real & (logits.argmax(-1) == labels))


@nnx.jit
def train_step(model, optimizer, images, labels, real):
    """Updates the model, its running statistics and the optimizer, all in place."""
    (loss, hits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, images, labels, real)
    optimizer.update(model, grads)
    return loss, hits


@nnx.jit
def predict(model, images):
    return model(images)


def create(seed, momentum, transformation, mesh):
    """A network and its optimizer, replicated on all devices."""
    model = ResidualNet(momentum, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    load(model, optimizer, jax.device_put(state_of(model, optimizer), NamedSharding(mesh, P())))
    return model, optimizer


def state_of(model, optimizer):
    """The state to save; running statistics are part of the model's state."""
    return {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}


def load(model, optimizer, state):
    nnx.update(model, state["model"])
    nnx.update(optimizer, state["optimizer"])


def train(args, model, optimizer, images, labels, mesh, epochs, title):
    rows = NamedSharding(mesh, P("batch"))
    model.train()
    with tqdm(epochs, unit="epoch", desc=title, file=sys.stdout, mininterval=0.5) as bar:
        for epoch in bar:
            # The order depends only on seed and epoch, so a resumed run has the same batches.
            rng = np.random.default_rng((args.seed, epoch))
            correct = 0
            for batch in batches(images, labels, args.batch_size, rng):
                loss, hits = train_step(model, optimizer, *jax.device_put(batch, rows))
                correct += int(hits)
            bar.set_postfix(loss=f"{float(loss):.4f}", accuracy=f"{correct / len(images):.4f}")


def train_and_resume(args, images, labels, mesh):
    """Trains one network to the end, and a second one from a checkpoint halfway."""
    steps = args.epochs * -(-len(images) // args.batch_size)
    before, after = range(args.epochs // 2), range(args.epochs // 2, args.epochs)
    # One object for both: nnx.jit compares it by identity, and would compile the step again.
    transformation = make_optimizer(steps)
    first = create(args.seed, args.momentum, transformation, mesh)
    second = create(args.seed + 1, args.momentum, transformation, mesh)

    # Use a permanent folder to resume in another process.
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        path = Path(folder, "halfway")
        train(args, *first, images, labels, mesh, before, "first half")
        checkpointer.save(path, state_of(*first))
        checkpointer.wait_until_finished()
        train(args, *first, images, labels, mesh, after, "second half")

        # Restored arrays get the shapes, dtypes and shardings of the second network's state.
        load(*second, checkpointer.restore(path, state_of(*second)))
        train(args, *second, images, labels, mesh, after, "resumed")
    return first, second


def population_statistics(model, images):
    """Statistics of all training images as one batch: momentum 0 keeps no older statistics."""
    whole = nnx.clone(model)
    whole.train(momentum=0.0)
    predict(whole, images)
    return nnx.to_pure_dict(nnx.state(whole, nnx.BatchStat))


def main(argv=None):
    args = parse(make_parser(__doc__, epochs=20), argv)
    devices = pick_devices(args.devices)
    x_train, x_test, y_train, y_test = load_data(args.seed)
    print(f"data: {len(x_train)} training and {len(x_test)} test images of 8 x 8 pixels")

    mesh = Mesh(np.array(devices), ("batch",))
    start = time.perf_counter()
    first, second = train_and_resume(args, x_train, y_train, mesh)
    print(f"training took {time.perf_counter() - start:.0f} s")

    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), state_of(*first), state_of(*second))
    apart = float(max(jax.tree.leaves(gaps)))
    print(f"trained to the end and resumed halfway, largest difference: {apart}")
    assert apart == 0, "a resumed training must have the same result"

    model, _ = second
    model.eval()
    running = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    check_statistics(args, running, population_statistics(model, x_train))

    # A copy, since serving in training mode updates the running statistics.
    mistaken = nnx.clone(model)
    mistaken.train()
    serve, serve_in_training = partial(predict, model), partial(predict, mistaken)
    return check_serving(args, serve, serve_in_training, x_test, y_test)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; nothing was written")
