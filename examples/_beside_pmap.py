"""Code that shard_map.py and sharded_jit.py share: both train, compare with pmap and print.

The model and its loss are those of digits.py. Arrays are float64 here. Adam divides a gradient by
its magnitude, so it turns the rounding error of a zero gradient into a full step. In float32 such
errors would hide a real difference.
"""

import sys

import _common
import digits
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm


def side_by_side(way, doc, make_step, argv=None):
    """Trains with pmap and with `way` from the same initial values, and compares the results.

    Args:
        way: the title of the column.
        doc: the description of the script.
        make_step: from a model, an optimizer and a mesh to a function of the state and a batch.

    Returns:
        The largest difference in each row of the table, and for the last batch.
    """
    args = _common.parse(_common.make_parser(doc, epochs=5), argv)
    jax.config.update("jax_enable_x64", True)
    devices = _common.pick_devices(args.devices)
    x_train, x_test, y_train, y_test = _common.load_data(args.seed)
    x_train, x_test = x_train.astype(np.float64), x_test.astype(np.float64)
    print(f"data: {len(x_train)} training and {len(x_test)} test images of 8 x 8 pixels")

    model = digits.ResidualNet(args.momentum)
    variables = model.init(jax.random.key(args.seed), x_train[:1], train=False)
    variables = jax.tree.map(np.float64, variables)
    optimizer = _common.make_optimizer(args.epochs * -(-len(x_train) // args.batch_size))
    state = jax.tree.map(np.asarray, digits.initial_state(variables, optimizer))
    mesh = Mesh(np.array(devices), ("batch",))

    step = digits.mapped_step(model, optimizer, devices)
    mapped = train("pmap", step, digits.on_each_device(state, devices), args, x_train, y_train)
    mapped = jax.tree.map(lambda leaf: leaf[0], mapped)
    step = make_step(model, optimizer, mesh)
    ours = train(way, step, on_mesh(state, mesh), args, x_train, y_train)

    def accuracy(state):
        served = {"params": state[0], "batch_stats": state[1]}
        return _common.accuracy(digits.predict(model, served, x_test), y_test)

    rows = {
        "loss of the last step": lambda state, loss: loss,
        "test accuracy": lambda state, loss: accuracy(state),
        "parameters, length": lambda state, loss: flat(state[0]),
        "running statistics, length": lambda state, loss: flat(state[1]),
    }
    print(f"\n{'':28}{'pmap':>12}{way:>14}{'largest difference':>22}")
    apart = {name: print_row(name, row(*mapped), row(*ours)) for name, row in rows.items()}

    last = list(batches(args, 1, x_train, y_train))[-1]
    start = jax.tree.map(np.asarray, ours[0])
    apart["last batch"] = compare_last_batch(make_step, model, start, last, mesh)
    return apart


def batches(args, epochs, images, labels):
    rng = np.random.default_rng(args.seed)
    for _ in range(epochs):
        yield from _common.batches(images, labels, args.batch_size, rng)


def train(name, step, state, args, images, labels):
    """The state after all epochs, and the loss of the last step."""
    steps = args.epochs * -(-len(images) // args.batch_size)
    with tqdm(total=steps, unit="step", desc=name, file=sys.stdout, mininterval=0.5) as bar:
        for batch in batches(args, args.epochs, images, labels):
            state, (loss, _) = step(state, *batch)
            jax.block_until_ready(loss)
            bar.update()
    return jax.device_get((state, loss))


def make_plain_step(model, optimizer):
    """The training step, written for one device."""
    loss_fn = digits.make_loss(model.clone(axis_name=None))

    def step(state, images, labels, real):
        params, batch_stats, opt_state = state
        (loss, (batch_stats, hits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch_stats, images, labels, real, real.sum()
        )
        params, opt_state = digits.descend(optimizer, params, opt_state, grads)
        return (params, batch_stats, opt_state), (loss, hits)

    return step


def compare_last_batch(make_step, model, state, batch, mesh):
    """Compares a padded, masked batch on the mesh with only its real images on one device."""
    images, labels, real = batch
    plain = optax.sgd(1.0)  # moves the parameters by the gradient itself
    start = (*state[:2], plain.init(state[0]))
    padded = make_step(model, plain, mesh)(on_mesh(start, mesh), images, labels, real)
    alone = jax.jit(make_plain_step(model, plain))(start, images[real], labels[real], real[real])
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))), padded, alone)
    apart = float(max(jax.tree.leaves(gaps)))
    print(
        f"\nlast batch: {real.sum()} of {len(real)} images are real, the others are padding.\n"
        f"Compared with only the real images on one device, loss, gradients and running\n"
        f"statistics differ by at most {apart:.1e}"
    )
    return apart


def on_mesh(state, mesh):
    """Replicates the state on all devices of the mesh."""
    return jax.device_put(state, NamedSharding(mesh, P()))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def print_row(name, mapped, ours):
    apart = float(np.max(np.abs(mapped - ours)))
    lengths = [float(np.linalg.norm(v)) for v in (mapped, ours)]
    print(f"{name:28}{lengths[0]:12.6f}{lengths[1]:14.6f}{apart:22.1e}")
    return apart
