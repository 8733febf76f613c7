"""Measures the errors of each library's batch norm against NumPy float64, as Markdown.

    python -m benchmarks.accuracy                     # print the tables
    python -m benchmarks.accuracy --out results.md    # and write them

Libraries that are not installed get an empty column: pip install "normjax[benchmarks,torch]".

normjax computes mean and variance in a different form on each platform. All three forms run here on
the CPU, each in its own process, since a process lowers for one platform only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np

import normjax
from normjax._core.lowering import PLATFORMS, VARIABLE
from tests import hard

MOMENTUM, EPSILON, DEVICES = 0.99, 1e-5, 4
LENGTHS = (256, 4096, 40_000)
ROOT = Path(__file__).parents[1]


class Normjax:
    """Adapters share three methods; one is missing if the library has no such feature."""

    name, package = "normjax", "normjax"

    def train(self, x, mask=None, axis_name=None, momentum=MOMENTUM, stats=None):
        stats = normjax.BatchStats.make(x.shape[-1]) if stats is None else stats
        return normjax.batch_norm(
            x, stats, train=True, momentum=momentum, mask=mask, axis_name=axis_name
        )

    def batch_variance_on_devices(self, x, mask):
        return jax.pmap(lambda x, m: self.train(x, m, "d", 0.0)[1].var, "d")(x, mask)[0]

    def masked(self, x, mask):
        return self.train(x, mask)[0]

    def forward(self, x):
        y, stats = self.train(x)
        return y, stats.mean.dtype

    def evaluate(self, x, steps):
        stats = normjax.BatchStats.make(x.shape[-1], counted=True)
        for _ in range(steps):
            _, stats = normjax.batch_norm(x, stats, train=True, debias=True)
        return normjax.batch_norm(x, stats, train=False)[0]


class Flax:
    name, package = "flax", "flax"

    def __init__(self):
        import flax.linen as nn

        self.norm = partial(nn.BatchNorm, epsilon=EPSILON)

    def apply(self, x, use_running_average=False, state=None, mask=None, **options):
        norm = self.norm(dtype=x.dtype, **options)
        if state is None:
            state = norm.init(jax.random.key(0), x, use_running_average=True)
        y, updates = norm.apply(state, x, use_running_average, mask=mask, mutable=["batch_stats"])
        return y, {**state, **updates}

    def batch_variance_on_devices(self, x, mask):
        step = partial(self.apply, axis_name="d", momentum=0.0)
        state = jax.pmap(lambda x, m: step(x, mask=m)[1], "d")(x, mask)
        return state["batch_stats"]["var"][0]

    def masked(self, x, mask):
        return self.apply(x, mask=mask)[0]

    def forward(self, x):
        y, state = self.apply(x)
        return y, state["batch_stats"]["mean"].dtype

    def evaluate(self, x, steps):
        state = None
        for _ in range(steps):
            _, state = self.apply(x, state=state)
        return self.apply(x, use_running_average=True, state=state)[0]


class Haiku:
    name, package = "haiku", "dm-haiku"

    def __init__(self):
        import haiku as hk

        def call(x, train):
            return hk.BatchNorm(True, True, MOMENTUM, eps=EPSILON)(x, is_training=train)

        self.net = hk.transform_with_state(call)

    def forward(self, x):
        params, state = self.net.init(None, x, True)
        y, state = self.net.apply(params, state, None, x, True)
        return y, state["batch_norm/~/mean_ema"]["average"].dtype

    def evaluate(self, x, steps):
        params, state = self.net.init(None, x, True)
        for _ in range(steps):
            _, state = self.net.apply(params, state, None, x, True)
        return self.net.apply(params, state, None, x, False)[0]


class Equinox:
    name, package = "equinox", "equinox"

    def __init__(self):
        import equinox as eqx

        self.eqx = eqx

    def make(self, x):
        norm, state = self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)(
            x.shape[-1], "batch", mode="batch", momentum=MOMENTUM, eps=EPSILON, dtype=x.dtype
        )
        self.run = lambda norm, x, s: jax.vmap(
            norm, in_axes=(0, None), out_axes=(0, None), axis_name="batch"
        )(x, s)
        return norm, state

    def forward(self, x):
        norm, state = self.make(x)
        y, state = self.run(norm, x, state)
        leaves = [
            leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "shape", None) == x.shape[-1:]
        ]
        return y, leaves[0].dtype

    def evaluate(self, x, steps):
        norm, state = self.make(x)
        for _ in range(steps):
            _, state = self.run(norm, x, state)
        return self.run(self.eqx.nn.inference_mode(norm), x, state)[0]


class Keras:
    name, package = "keras (JAX)", "keras"

    def __init__(self):
        import keras

        self.layer = partial(keras.layers.BatchNormalization, momentum=MOMENTUM, epsilon=EPSILON)

    def masked(self, x, mask):
        layer = self.layer()
        layer.build(x.shape)
        variables = (
            [v.value for v in layer.trainable_variables],
            [v.value for v in layer.non_trainable_variables],
        )
        return layer.stateless_call(*variables, x, training=True, mask=mask[:, 0])[0]

    def forward(self, x):
        layer = self.layer(dtype=str(x.dtype))
        y = layer(x, training=True)
        return y, jnp.asarray(layer.moving_mean.value).dtype

    def evaluate(self, x, steps):
        layer = self.layer()
        for _ in range(steps):
            layer(x, training=True)
        return layer(x, training=False)


class Torch:
    name, package = "PyTorch", "torch"

    def __init__(self):
        import torch

        self.torch = torch

    def make(self, x):
        t = self.torch.tensor(np.asarray(x, np.float32))
        t = t.to(self.torch.bfloat16) if x.dtype == jnp.bfloat16 else t
        norm = self.torch.nn.BatchNorm1d(
            x.shape[-1], eps=EPSILON, momentum=1 - MOMENTUM, dtype=t.dtype
        )
        return norm, t

    def forward(self, x):
        norm, t = self.make(x)
        return norm(t).detach().float().numpy(), norm.running_mean.dtype

    def evaluate(self, x, steps):
        norm, t = self.make(x)
        for _ in range(steps):
            norm(t)
        return norm.eval()(t).detach().numpy()


def exact(x, mask=None):
    x = np.asarray(x, np.float64)
    valid = slice(None) if mask is None else np.asarray(mask)[:, 0]
    return (x - x[valid].mean(0)) / np.sqrt(x[valid].var(0) + EPSILON)


def number(value):
    value = float(value)
    return "NaN" if np.isnan(value) else f"{value:.1e}" if value < 0.1 else f"{value:.3g}"


def largest_error(y, want):
    return number(np.max(np.abs(np.asarray(y, np.float64) - want)))


def data(loc, n=4096, features=4, scale=1.0):
    return np.random.default_rng(0).normal(loc, scale, (n, features)).astype(np.float32)


def masked_and_shared(library, empty_device):
    x = np.random.default_rng(1).normal(0, 1, (DEVICES, 8, 1)).astype(np.float32)
    x += np.array([0, 1, 2, 3], np.float32).reshape(4, 1, 1)
    mask = np.arange(8).reshape(1, 8, 1) < np.array([8, 2, 5, 0 if empty_device else 1]).reshape(
        4, 1, 1
    )
    want = x[mask].astype(np.float64).var()
    return number(abs(float(library.batch_variance_on_devices(x, mask)[0]) - want) / want)


def nan_under_a_mask(library):
    x, mask = data(0.0, 8), np.arange(8)[:, None] < 6
    x[~mask[:, 0]] = np.nan

    def loss(x):
        y = library.masked(x, jnp.asarray(mask))
        return jnp.where(mask, y, 0).astype(jnp.float32).sum() + jnp.where(mask, y**2, 0).sum()

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(x)))[mask[:, 0]]
    return f"{np.mean(~np.isfinite(gradient)):.0%} not finite"


def offset(library, loc):
    x = data(loc)
    return largest_error(library.forward(jnp.asarray(x))[0], exact(x))


def half_precision(library):
    x = jnp.asarray(data(100.0), jnp.bfloat16)
    y, kept = library.forward(x)
    deviation = float(np.asarray(y, np.float32).std(0).mean())
    return f"{deviation:.3f}, {str(kept).removeprefix('torch.')}"


def evaluation(library, steps):
    x = data(50.0, 64, scale=0.1)
    return largest_error(library.evaluate(jnp.asarray(x), steps), exact(x))


ROWS = {
    "variance over 4 devices, unequal masks: relative error": partial(
        masked_and_shared, empty_device=False
    ),
    "the same, one device without a valid row": partial(masked_and_shared, empty_device=True),
    "NaN in masked rows: gradient of the other rows": nan_under_a_mask,
    "x ~ N(1e2, 1) float32: error of y": partial(offset, loc=1e2),
    "x ~ N(1e3, 1) float32: error of y": partial(offset, loc=1e3),
    "x ~ N(1e4, 1) float32: error of y": partial(offset, loc=1e4),
    "x ~ N(100, 1) bfloat16: deviation of y (exact: 1), running mean kept in": half_precision,
    "evaluation after 1 step, x ~ N(50, 0.1): error of y": partial(evaluation, steps=1),
    "evaluation after 100 steps on one batch: error of y": partial(evaluation, steps=100),
}


def installed():
    for adapter in (Flax, Haiku, Equinox, Keras, Torch):
        with suppress(ImportError):
            yield adapter()


def cell(row, library):
    try:
        return row(library)
    except AttributeError as error:
        if error.obj is library:
            return "no such feature"
        raise


def cells(library):
    return [cell(row, library) for row in ROWS.values()]


def worst(case, n):
    """The largest error of a norm over all inputs, in units, and the input that has it."""
    found = [(max(units), name, units) for name, units in hard.errors_of_case(case, n)]
    most, name, units = max(found, key=lambda entry: entry[0])
    quantity = ("y", "var", "dx")[units.index(most)]
    return f"{most:.1f} ({quantity}, {name})" if most < 1000 else f"{most:.0e} ({quantity}, {name})"


def own():
    """The results of normjax in this process, in the form of the platform it lowers for."""
    units = {f"{case}|{n}": worst(case, n) for case in hard.CASES for n in LENGTHS}
    return {"cells": cells(Normjax()), "units": units}


def in_form(form):
    """`own`, run in a process that lowers in the form of a platform."""
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy", "--own"],
        cwd=ROOT,
        env={**os.environ, VARIABLE: form},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(ran.stdout)


def line(*found):
    return "| " + " | ".join(found) + " |"


def compared(forms):
    """The table of all libraries."""
    columns = {
        f"normjax {normjax.__version__}, {form.upper()}": found["cells"]
        for form, found in forms.items()
    }
    for library in installed():
        columns[f"{library.name} {version(library.package)}"] = cells(library)
    yield line("", *columns)
    yield "|---|" + "---|" * len(columns)
    for title, *row in zip(ROWS, *columns.values(), strict=True):
        yield line(title, *row)


TITLES = {
    "batch, near": "batch norm, running mean at most s / 2 off",
    "batch, edge": "batch norm, running mean 1.41 s off",
    "batch, far": "batch norm, running mean far, not finite, or none",
    "batch, overflow": "batch norm, running mean 1e4 s off or 1e18",
    "layer": "layer norm",
    "rms": "RMS norm",
    "instance": "instance norm",
    "group": "group norm",
}


def in_units(forms):
    """The table of the forms of normjax."""
    yield line("norm", "entries", *(form.upper() for form in forms))
    yield "|---|---|" + "---|" * len(forms)
    for case in hard.CASES:
        for n in LENGTHS:
            found = (forms[form]["units"][f"{case}|{n}"] for form in forms)
            yield line(TITLES[case], f"{n:,}", *found)


def report():
    forms = {form: in_form(form) for form in PLATFORMS}
    yield "# Errors"
    yield ""
    yield from compared(forms)
    yield ""
    yield (
        f"{date.today()}, CPU ({platform.machine()}), Python {platform.python_version()}, "
        f"jax {jax.__version__}. Errors are the largest absolute ones against NumPy float64; "
        "defaults of each library but momentum 0.99, epsilon 1e-5 and Equinox's mode='batch'. "
        "In the last two rows normjax uses debias=True; other libraries have no such option. "
        "CPU, GPU and TPU are the forms in which normjax computes mean and variance on these "
        "platforms; all were run on this CPU."
    )
    yield ""
    yield (
        f"The same three forms on {len(hard.inputs(256))} inputs that are numerically difficult "
        "(tests/hard.py), in float32: the largest error of y, of the variance and of the gradient "
        "of x, in units of eps (1 + |mean| / s) with s = sqrt(var + epsilon), and its input."
    )
    yield ""
    yield from in_units(forms)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--own", action="store_true", help="normjax alone, as JSON")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_platforms", "cpu")
    if args.own:
        print(json.dumps(own()))
        return
    text = "\n".join(report()) + "\n"
    sys.stdout.write(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
