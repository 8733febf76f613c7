"""Variances in half precision: where they fail, and what float32 changes.

python examples/evidence/half_precision.py            # a few seconds
python examples/evidence/half_precision.py --smoke    # to see that it runs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import _evidence as evidence
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from _evidence import Claim, Conclusion, Options
from _training import dense_layers, digits
from jax import Array
from matplotlib.figure import Figure

import normjax

CLAIM = Claim(
    title="Half precision",
    text="Mean and variance must be computed in float32, not in half precision.",
    source="Micikevicius et al. 2018, section 3.3 (arXiv:1710.03740)",
)
OFFSETS = (0, 1, 10, 100, 1000)
DTYPES = ("bfloat16", "float16", "float32")
WIDTH, EPSILON = 64, 1e-5
# A variance that is off by more has failed; one off by less than SMALL is as good as exact.
FAILED, SMALL = 0.1, 0.01

# x (N, C) -> variance (C,), y (N, C)
Method = Callable[[Array], tuple[Array, Array]]


def naive(x: Array) -> tuple[Array, Array]:
    """E[x^2] - E[x]^2, every result in the dtype of x; XLA adds in float32 inside of a sum."""
    mean, square = x.sum(0) / len(x), (x * x).sum(0) / len(x)
    variance = jnp.maximum(square - mean * mean, 0)
    return variance, (x - mean) * jax.lax.rsqrt(variance + jnp.asarray(EPSILON, x.dtype))


def naive_float32(x: Array) -> tuple[Array, Array]:
    variance, y = naive(x.astype(jnp.float32))
    return variance, y.astype(x.dtype)


def by_flax(x: Array) -> tuple[Array, Array]:
    """Its defaults: E[x^2] - E[x]^2 in float32; the variance is read from what it stores."""
    module = flax.linen.BatchNorm(
        use_running_average=False, momentum=0.0, epsilon=EPSILON, dtype=x.dtype
    )
    # Flax's type says that there may be no updates, whatever is mutable.
    result: Any = module.apply(module.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    y, updates = result
    return updates["batch_stats"]["var"], y


def by_normjax(x: Array) -> tuple[Array, Array]:
    stats = normjax.BatchStats.make(x.shape[-1])
    y, stats = normjax.batch_norm(x, stats, train=True, momentum=0, epsilon=EPSILON)
    return stats.var, y


METHODS: dict[str, Method] = {
    "formula in the dtype": naive,
    "formula in float32": naive_float32,
    "flax.linen.BatchNorm": by_flax,
    "normjax.batch_norm": by_normjax,
}


class Found(NamedTuple):
    # By dtype and method: the largest relative error of a variance, and the largest error of y,
    # (seeds, offsets); infinite where a value is not finite.
    variance: dict[tuple[str, str], np.ndarray]
    y: dict[tuple[str, str], np.ndarray]
    # The largest sum of squares of a feature, by offset.
    squares: np.ndarray


def activations(seed: int) -> np.ndarray:
    """A random dense layer with ReLU on all digits for training; each feature mean 0, deviation 1.

    Features that are zero for all images are left out.
    """
    x = digits().images.reshape(len(digits().images), -1)
    (layer,) = dense_layers(jax.random.key(seed), [x.shape[1], WIDTH])
    x = np.maximum(x.astype(np.float64) @ np.asarray(layer["weight"], np.float64), 0)
    x = x[:, x.std(0) > 0]
    return np.asarray((x - x.mean(0)) / x.std(0))


def finite(errors: np.ndarray) -> float:
    """The largest error; infinite for NaN."""
    return float(np.nan_to_num(errors, nan=np.inf, posinf=np.inf).max())


def measure(options: Options) -> Found:
    offsets = OFFSETS
    shape = (options.seeds, len(offsets))
    keys = [(dtype, method) for dtype in DTYPES for method in METHODS]
    variance = {key: np.zeros(shape) for key in keys}
    of_y = {key: np.zeros(shape) for key in keys}
    squares = np.zeros(len(offsets))
    compiled = {name: jax.jit(method) for name, method in METHODS.items()}
    for seed in range(options.seeds):
        standard = activations(seed)
        for column, offset in enumerate(offsets):
            squares[column] = max(squares[column], ((standard + offset) ** 2).sum(0).max())
            for dtype in DTYPES:
                x = jnp.asarray(standard + offset, dtype)
                # Against the rounded input: what rounding it has cost is no fault of a method.
                exact = np.asarray(x, np.float64)
                var = exact.var(0)
                y = (exact - exact.mean(0)) / np.sqrt(var + EPSILON)
                for name, method in compiled.items():
                    got, got_y = (np.asarray(part, np.float64) for part in method(x))
                    variance[dtype, name][seed, column] = finite(np.abs(got - var) / var)
                    of_y[dtype, name][seed, column] = finite(np.abs(got_y - y))
    return Found(variance, of_y, squares)


def worst(found: Found, dtype: str, name: str) -> np.ndarray:
    """The median over seeds of the largest error of a variance, by offset."""
    return np.asarray(np.median(found.variance[dtype, name], 0))


def fails_from(found: Found, dtype: str, name: str) -> str:
    """The first offset at which the variance has failed."""
    failed = worst(found, dtype, name) > FAILED
    return f"{OFFSETS[failed.argmax()]}" if failed.any() else "never"


def percent(error: float) -> str:
    if not np.isfinite(error):
        return "∞ or NaN"
    if error >= 10:
        return f"{error:,.0f} times"
    return f"{100 * error:.0f} %" if error > 0.1 else f"{100 * error:.1g} %"


def conclude(found: Found) -> Conclusion:
    halves = DTYPES[:2]
    half_fails = [fails_from(found, dtype, "formula in the dtype") != "never" for dtype in halves]
    exact = all((worst(found, dtype, "normjax.batch_norm") < SMALL).all() for dtype in halves)
    rows = [
        [dtype, name, *(percent(error) for error in worst(found, dtype, name)),
         f"{np.median(found.y[dtype, name], 0).max():.2g}".replace("inf", "∞ or NaN")]
        for dtype in DTYPES
        for name in METHODS
    ]  # fmt: skip
    first = {dtype: fails_from(found, dtype, "formula in the dtype") for dtype in DTYPES}
    overflow = next(o for o, s in zip(OFFSETS, found.squares, strict=True) if s > 65504)
    flax_float32 = max(worst(found, dtype, "flax.linen.BatchNorm").max() for dtype in halves)
    ours = max(worst(found, dtype, "normjax.batch_norm").max() for dtype in halves)
    return Conclusion(
        held="yes" if all(half_fails) and exact else "partly" if any(half_fails) else "no",
        number=f"bfloat16 fails from a mean of {first['bfloat16']} deviations on",
        text=(
            f"The variance of activations of digits is off by more than {100 * FAILED:.0f} % in "
            f"bfloat16 from a mean of {first['bfloat16']} deviations on, in float16 from "
            f"{first['float16']} on. In float16 the sum of squares is above its largest number, "
            f"65504, from a mean of {overflow} on. Float32 alone does not suffice: the formula "
            f"E[x²] - E[x]² in float32 fails from {first['float32']} on (in flax.linen.BatchNorm, "
            f"which uses it, the variance of half precision input is off by up to "
            f"{percent(flax_float32)}). normjax sums squares around the mean in float32, and its "
            f"variance of half precision input is off by at most {percent(ours)}."
        ),
        header=[
            "dtype of x", "method", *(f"mean {offset}" for offset in OFFSETS), "largest error of y",
        ],
        rows=rows,
    )  # fmt: skip


def draw(figure: Figure, found: Found) -> None:
    figure.set_size_inches(10, 4.6)
    top = 1e4
    for panel, dtype in zip(figure.subplots(1, 3, sharey=True), DTYPES, strict=True):
        # Two lines coincide: a large marker below a small one shows both.
        for name, size in zip(METHODS, (6, 11, 6, 6), strict=True):
            errors = np.clip(worst(found, dtype, name), 1e-8, top)
            panel.plot(range(len(OFFSETS)), errors, marker="o", ms=size, label=name)
        panel.axhline(FAILED, color="gray", lw=1, ls=":")
        panel.set(yscale="log", ylim=(1e-8, 3 * top), xlabel="mean of x, in deviations")
        panel.set_xticks(range(len(OFFSETS)), [str(offset) for offset in OFFSETS])
        panel.set_title(f"x in {dtype}")
    figure.axes[0].set_ylabel("relative error of the variance\n($10^4$ also for ∞ and NaN)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(f"Variance in half precision: {conclude(found).number}")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw, seeds=5)
