"""Counts in training runs how often norms need a second pass over x.

    python -m benchmarks.second_pass                           # print the table
    python -m benchmarks.second_pass --out docs/results  # and write it
    python -m benchmarks.second_pass --only digits --scale 0.1 # a part of it

On a GPU and on a TPU, batch norm sums around its running mean in one pass over x. It needs a
second, exact pass if, for any feature, the running mean is far from the batch mean:

    (mean - running mean)^2 > 2 (var + epsilon)

On a GPU, group and instance norm do the same around the mean of a sample of x. On a TPU, group norm
does it around zero, for the mean and variance of its groups. Here the condition is evaluated
outside of the layers, from the inputs of each layer and exact moments. tests/test_second_pass.py
tests that compiled programs take the same branches.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import normjax.linen
from benchmarks import machine, tables
from normjax._core import algorithms
from normjax._core.lowering import VARIABLE

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _common
import digits
import finetune

EARLY, LIMIT = 100, 2.0
MOMENTA = (0.9, 0.99)
WITHIN = (normjax.linen.GroupNorm, normjax.linen.InstanceNorm)


class Guard(NamedTuple):
    """The condition for a second pass, in one layer and step.

    Attributes:
        excess: the largest of (mean - pivot)^2 / (var + floor) over its features.
        feature: the index of that feature.
        off, spread: |mean - pivot| and sqrt(var) of that feature.
        features: the number of features for which the condition holds.
    """

    excess: Any
    feature: Any
    off: Any
    spread: Any
    features: Any

    @classmethod
    def make(cls, mean: Any, var: Any, pivot: Any, floor: Any) -> Guard:
        """The arrays have the shape of the features, the last axis, or (examples, features)."""
        off, var = (v.astype(jnp.float32) for v in (jnp.abs(mean - pivot), var))
        allowed = var + floor
        # 0 / 0 is a constant feature that is equal to its pivot.
        excess = jnp.where(off == 0, 0, jnp.square(off) / allowed).reshape(-1)
        worst = jnp.argmax(excess)
        return cls(
            excess[worst],
            worst % mean.shape[-1],
            off.reshape(-1)[worst],
            jnp.sqrt(var.reshape(-1)[worst]),
            jnp.sum(excess > LIMIT),
        )


def of_batch_norm(module: nn.Module, x: Any, mask: Any) -> Guard | None:
    """The guard of batch norm; None if the layer does not measure, as in evaluation and init."""
    if not module.has_variable("batch_stats", "mean"):
        return None
    axes = tuple(range(x.ndim - 1))
    where = None if mask is None else jnp.broadcast_to(mask, x.shape).astype(bool)
    mean, var = jnp.mean(x, axes, where=where), jnp.var(x, axes, where=where)
    return Guard.make(mean, var, module.get_variable("batch_stats", "mean"), module.epsilon)


def of_sample(x: Any) -> Guard | None:
    """The guard of group and instance norm on a GPU; None if x is too small for a sample."""
    axes = tuple(range(1, x.ndim - 1))
    sample = algorithms.sample(x, None, axes)
    if sample is None:
        return None
    sample = jnp.squeeze(sample, axes)
    rounding = jnp.square(8 * jnp.finfo(jnp.float32).eps * sample)
    return Guard.make(jnp.mean(x, axes), jnp.var(x, axes), sample, rounding)


def of_groups(module: nn.Module, x: Any) -> Guard:
    """The guard of group norm on a TPU."""
    groups = module.num_groups or x.shape[-1] // module.group_size
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    axes = (*range(1, x.ndim - 1), x.ndim)
    mean, var = jnp.mean(grouped, axes), jnp.var(grouped, axes)
    return Guard.make(mean, var, jnp.zeros_like(mean), module.epsilon)


def watched(
    apply: Callable[..., Any], platform: str, *args: Any, **how: Any
) -> tuple[Any, dict[str, Guard]]:
    """The result of `apply`, and the guard of each layer by the name of the layer."""
    seen: dict[str, Guard] = {}

    def intercept(call: Any, args: Any, how: Any, context: Any) -> Any:
        module, guard = context.module, None
        if context.method_name == "__call__" and isinstance(module, nn.Module):
            if isinstance(module, normjax.linen.BatchNorm):
                guard = of_batch_norm(module, args[0], how.get("mask"))
            elif platform == "tpu" and isinstance(module, normjax.linen.GroupNorm):
                guard = of_groups(module, args[0])
            elif platform == "gpu" and isinstance(module, WITHIN):
                guard = of_sample(args[0])
        if guard is not None:
            seen["/".join(module.path)] = jax.lax.stop_gradient(guard)
        return call(*args, **how)

    with nn.intercept_methods(intercept):
        return apply(*args, **how), seen


@cache
def watched_step(
    loss: Callable[..., Any], platform: str, optimizer: optax.GradientTransformation
) -> Any:
    """A compiled training step: it maps a state and a batch to the next state and the guards."""

    @jax.jit
    def step(state: Any, *batch: Any) -> tuple[Any, dict[str, Guard]]:
        params, stats, kept = state

        def watched_loss(params: Any) -> tuple[Any, Any]:
            (value, moved), seen = watched(loss, platform, params, stats, *batch)
            return value, (moved, seen)

        gradient, (moved, seen) = jax.grad(watched_loss, has_aux=True)(params)
        change, kept = optimizer.update(gradient, kept, params)
        return (optax.apply_updates(params, change), moved, kept), seen

    return step


class Run(NamedTuple):
    """A training run.

    Attributes:
        title: the model and its data.
        momentum: that of the running statistics, or None.
        steps: the number of steps of the optimizer.
        loss: from parameters, statistics and a batch to (loss, next statistics).
        optimizer: the optimizer.
        start: parameters and statistics.
        batches: from a number of steps to that many batches.
        platform: the platform of the guards; those of batch norm are the same on both.
    """

    title: str
    momentum: float | None
    steps: int
    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation
    start: tuple[Any, Any]
    batches: Callable[[int], Iterator[tuple[Any, ...]]]
    platform: str = "gpu"

    def train(self) -> tuple[Any, dict[str, Guard]]:
        """The state at the end, and the guard of each layer, with an entry for each step."""
        step, seen = watched_step(self.loss, self.platform, self.optimizer), []
        state: Any = (*self.start, self.optimizer.init(self.start[0]))
        for batch in self.batches(self.steps):
            state, guards = step(state, *batch)
            seen.append(guards)
        return state, jax.tree.map(lambda *each: np.stack(each), *jax.device_get(seen))

    def conditionals(self, form: str) -> int:
        """The number of conditionals in a compiled step, in the form of a platform."""
        (batch,) = self.batches(1)

        def plain(params: Any, stats: Any, *batch: Any) -> Any:
            return jax.grad(self.loss, has_aux=True)(params, stats, *batch)

        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = form
        jax.clear_caches()
        try:
            # Only the text is read and the program is not run, so it needs no optimization.
            quick = {"xla_backend_optimization_level": 0}
            compiled = jax.jit(plain, compiler_options=quick).lower(*self.start, *batch).compile()
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
            jax.clear_caches()
        return compiled.as_text().count(" conditional(")


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


# One object for each rate, so that runs share their compiled step.
adam = cache(optax.adam)


def drawn(images: Any, labels: Any, size: int) -> Callable[[int], Iterator[tuple[Any, ...]]]:
    """Batches of `size` random images, the same in each run."""

    def batches(steps: int) -> Iterator[tuple[Any, ...]]:
        rng = np.random.default_rng(0)
        for _ in range(steps):
            chosen = rng.choice(len(images), size, replace=False)
            yield images[chosen], labels[chosen]

    return batches


def digits_runs(scale: float) -> Iterator[Run]:
    """The network of examples/digits.py; the last batch of an epoch is padded and masked."""
    images, _, labels, _ = _common.load_data(0)
    steps = round(20 * 12 * scale)

    def batches(steps: int) -> Iterator[tuple[Any, ...]]:
        rng = np.random.default_rng(0)
        while True:
            for batch in _common.batches(images, labels, 128, rng):
                if not steps:
                    return
                yield batch
                steps -= 1

    for momentum in MOMENTA:
        model = digits.ResidualNet(momentum, axis_name=None)

        def loss(params, stats, images, labels, real, model=model):
            given = digits.make_loss(model)(params, stats, images, labels, real, real.sum())
            return given[0], given[1][0]

        variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images[:1])
        start = variables["params"], variables["batch_stats"]
        optimizer = _common.make_optimizer(steps)
        yield Run("digits demo", momentum, steps, loss, optimizer, start, batches)


class Deep(nn.Module):
    """Twenty times convolution, ReLU, batch norm. Channels with `alive` 0 are 0 after the ReLU."""

    momentum: float
    depth: int = 20
    channels: int = 16

    @nn.compact
    def __call__(self, x, alive):
        for i in range(self.depth):
            x = nn.Conv(self.channels, (3, 3), strides=1 + (i == self.depth // 2))(x)
            x = normjax.linen.BatchNorm(momentum=self.momentum)(nn.relu(x) * alive, train=True)
        return nn.Dense(10)(x.mean((1, 2)))


# The learning rate, and the step from which a quarter of the channels of each layer is 0.
LIVES = {
    "no channel dies": (1e-3, None),
    "a quarter dead from the start": (1e-3, 0),
    "a quarter dies in step 150": (1e-3, 150),
    "learning rate 0.03": (3e-2, None),
}


def deep_runs(scale: float) -> Iterator[Run]:
    images, _, labels, _ = _common.load_data(0)
    steps = round(700 * scale)
    dying = np.arange(Deep.channels) % 4 == 0
    for momentum in MOMENTA:
        model = Deep(momentum)

        def loss(params, stats, images, labels, alive, model=model):
            variables = {"params": params, "batch_stats": stats}
            logits, updates = model.apply(variables, images, alive, mutable=["batch_stats"])
            return cross_entropy(logits, labels).mean(), updates["batch_stats"]

        variables = jax.jit(model.init)(jax.random.key(0), images[:2], np.ones(16, np.float32))
        start = variables["params"], variables["batch_stats"]
        for how, (rate, death) in LIVES.items():

            def batches(steps, death=death):
                for i, batch in enumerate(drawn(images, labels, 64)(steps)):
                    dead = dying & (death is not None and i >= death)
                    yield *batch, np.where(dead, 0, 1).astype(np.float32)

            title, optimizer = f"20 layers, {how}", adam(rate)
            yield Run(title, momentum, steps, loss, optimizer, start, batches)


def finetune_runs(scale: float) -> Iterator[Run]:
    """examples/finetune.py: trained on digits, then fine-tuned on another domain.

    It starts with the running statistics of the first domain.
    """
    images, _, labels, _ = finetune.load_data(0)
    rng = np.random.default_rng(0)
    domains = {name: np.float32(change(images, rng)) for name, change in finetune.DOMAINS.items()}
    for momentum in MOMENTA:

        def norm(train, momentum=momentum):
            return normjax.linen.BatchNorm(use_running_average=not train, momentum=momentum)

        model = finetune.ResidualNet(norm)

        def loss(params, stats, images, labels, model=model):
            variables = {"params": params, "batch_stats": stats}
            logits, updates = model.apply(variables, images, True, mutable=["batch_stats"])
            return cross_entropy(logits, labels).mean(), updates["batch_stats"]

        variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images[:1])
        start, steps = (variables["params"], variables["batch_stats"]), round(132 * scale)
        optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
        home = Run("", momentum, steps, loss, optimizer, start, drawn(images, labels, 128))
        (*tuned, _), _ = home.train()
        steps = round(300 * scale)
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
        for size in (1, 4, 32):
            for domain, changed in domains.items():
                batches, title = drawn(changed, labels, size), f"fine-tuning, {domain}, {size}"
                title += " image" + "s" * (size > 1)
                yield Run(title, momentum, steps, loss, optimizer, tuple(tuned), batches)


class UNet(nn.Module):
    """Two resolutions down and up, with skip connections, as in diffusion models."""

    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        def block(x, features):
            y = nn.Conv(features, (3, 3))(x)
            y = nn.Conv(features, (3, 3))(nn.silu(self.norm()(y)))
            y = nn.silu(self.norm()(y))
            return y + nn.Conv(features, (1, 1))(x)

        outer = block(x, 16)
        inner = block(nn.avg_pool(outer, (2, 2), (2, 2)), 32)
        x = block(nn.avg_pool(inner, (2, 2), (2, 2)), 32)
        for skip, features in ((inner, 32), (outer, 16)):
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[3]), "nearest")
            x = block(jnp.concatenate([x, skip], -1), features)
        return nn.Conv(1, (3, 3))(x)


def unet_runs(scale: float) -> Iterator[Run]:
    """Predicts the noise in noisy digits of 32 x 32 pixels."""
    images, _, labels, _ = _common.load_data(0)
    large = np.repeat(np.repeat(images, 4, 1), 4, 2)
    group_norm = partial(normjax.linen.GroupNorm, num_groups=8)
    norms = {
        "group norm, GPU": (group_norm, "gpu"),
        "group norm, TPU": (group_norm, "tpu"),
        "instance norm, GPU": (normjax.linen.InstanceNorm, "gpu"),
    }
    for name, (norm, platform) in norms.items():
        model = UNet(norm)

        def loss(params, stats, images, labels, noise, model=model):
            predicted = model.apply({"params": params}, images + noise)
            return jnp.mean(jnp.square(predicted - noise)), stats

        def batches(steps):
            rng = np.random.default_rng(0)
            for images, labels_ in drawn(large, labels, 16)(steps):
                level = rng.uniform(0, 1, (16, 1, 1, 1))
                noise = level * rng.normal(size=images.shape)
                yield images, labels_, noise.astype(np.float32)

        start = jax.jit(model.init)(jax.random.key(0), large[:1])["params"], {}
        steps, optimizer = round(300 * scale), optax.adam(1e-3)
        yield Run(f"U-Net, {name}", None, steps, loss, optimizer, start, batches, platform)


RUNS = {"digits": digits_runs, "deep": deep_runs, "finetune": finetune_runs, "unet": unet_runs}


class Found(NamedTuple):
    """The row of a run in the table.

    Attributes:
        first, then: shares of the layers' steps that need the second pass.
        largest: the largest (mean - pivot)^2 / (var + epsilon) in all steps of all layers.
        worst, worst_share: the layer that needs it most often after the first steps.
        cause: the deviation in the steps that need it.
    """

    run: Run
    layers: int
    first: float
    then: float
    largest: float
    worst: str
    worst_share: float
    cause: str


def found(run: Run, seen: dict[str, Guard]) -> Found:
    excess = np.stack([guard.excess for guard in seen.values()])
    # A mean that is not finite always needs the second pass.
    taken = ~(excess <= LIMIT)
    later = taken[:, EARLY:] if taken.shape[1] > EARLY else taken
    worst = int(np.argmax(later.mean(1) + 1e-6 * taken.mean(1)))
    names = list(seen)
    return Found(
        run,
        len(names),
        float(taken[:, :EARLY].mean()),
        float(later.mean()),
        float(excess.max()),
        names[worst].replace("_", " ") if taken.any() else "",
        float(later[worst].mean()),
        cause(taken, list(seen.values())),
    )


def cause(taken: np.ndarray, guards: Sequence[Guard]) -> str:
    """The median deviation in the steps with a second pass; without the first ones if possible."""
    when = taken.copy()
    when[:, :EARLY] &= not taken[:, EARLY:].any()
    if not when.any():
        return ""

    def median(name: str) -> float:
        return float(np.median(np.stack([getattr(guard, name) for guard in guards])[when]))

    number = round(median("features"))
    return (
        f"{number} feature{'s' * (number != 1)}, {median('off'):.2g} off at a deviation of "
        f"{median('spread'):.2g}"
    )


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def table(rows: Sequence[Found]) -> Iterator[str]:
    names = ["run", "momentum", "layers", "steps", f"first {EARLY}, %", "after, %"]
    names.append("largest ratio")
    yield from tables.header([*names, "worst layer", "after, %", "in the median of them"])
    for row in rows:
        momentum = "" if row.run.momentum is None else f"{row.run.momentum:g}"
        cells = [row.run.title, momentum, str(row.layers), str(row.run.steps)]
        cells += [percent(row.first), percent(row.then), f"{row.largest:.2g}", row.worst]
        yield tables.line([*cells, percent(row.worst_share), row.cause])


def branches(runs: Sequence[Run]) -> Iterator[str]:
    yield from tables.header(["model", "form of a GPU", "form of a TPU"])
    for run in runs:
        yield tables.line([run.title, *(str(run.conditionals(form)) for form in ("gpu", "tpu"))])


def report(rows: Sequence[Found], runs: Sequence[Run]) -> Iterator[str]:
    yield "# How often the second pass is taken"
    yield ""
    yield (
        f"{date.today()}, {machine.processor()}, jax {jax.__version__}. Counted in training runs "
        "in float32 by `python -m benchmarks.second_pass`: of all steps of all layers, the share "
        "in which for some feature (mean - pivot)^2 > 2 (var + epsilon). The pivot of batch norm "
        "is its running mean. For group and instance norm on a GPU it is the mean of a sample of "
        "x, and epsilon is not added; for the groups of group norm on a TPU it is 0. "
        "The largest ratio is (mean - pivot)^2 / (var + epsilon)."
    )
    yield ""
    yield from table(rows)
    yield ""
    root = np.sqrt(2e-5)
    lasts = (f"{np.log(0.5 / root) / -np.log(m):.0f} at {m:g}" for m in MOMENTA)
    yield (
        "A dead channel is 0, and so is its variance. Its running mean decays, and the second pass "
        f"is needed until that is below sqrt(2 epsilon) = {root:.4f}. From 0.5, a usual mean after "
        f"a ReLU, this takes the following number of steps at a momentum: {', '.join(lasts)}. "
        "One such channel is enough for its layer. Here channels die in all layers at once."
    )
    yield ""
    yield "Conditionals in a compiled training step."
    yield ""
    yield from branches(runs)


def main(argv: Sequence[str] | None = None) -> list[Found]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=machine.words, default=list(RUNS), help=", ".join(RUNS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument("--out", type=Path, help="folder to write into")
    args = parser.parse_args(argv)
    rows, titles, models = [], [], {}
    for name in args.only:
        for run in RUNS[name](args.scale):
            start = time.perf_counter()
            rows.append(found(run, run.train()[1]))
            titles.append(run.title)
            models.setdefault(run.title.split(",")[0], run)
            print(*list(table(rows))[-1:], f"{time.perf_counter() - start:.0f} s", flush=True)
    rows.sort(key=lambda row: titles.index(row.run.title))
    lines = list(report(rows, list(models.values())))
    print("\n".join(lines))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "second_pass.md").write_text("\n".join(lines) + "\n")
    return rows


if __name__ == "__main__":
    main()
