"""The style of a photograph as the means and variances of its features.

python examples/evidence/style_transfer.py            # half a minute on two cores
python examples/evidence/style_transfer.py --smoke    # a few seconds, to see that it runs
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import _evidence as evidence
import jax
import jax.numpy as jnp
import numpy as np
from _evidence import Claim, Conclusion, Options, spread
from jax import Array
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

import normjax

CLAIM = Claim(
    title="Style transfer",
    text="The mean and the variance of each feature are the style of an image.",
    source="Huang & Belongie 2017 (arXiv:1703.06868), Ulyanov et al. 2016 (arXiv:1607.08022)",
)
HEIGHT, WIDTH, PADDING = 256, 384, 64
SCALES, ORIENTATIONS = 5, 4
NAMES = ("temple", "flower")
# What has to be left of the distance to the style, and of the correlation with the content.
NEAR, KEPT = 0.5, 0.5
# An orthonormal basis of colors: gray, yellow to blue, red to green.
COLORS = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])


class Transfer(NamedTuple):
    """One content in the style of the other photograph.

    Distances are those of the statistics to the style's, before and after: in the features that
    were normalized, and in those of a random network, by seed.
    """

    # Content, style and result, (H, W, 3) from 0 to 1.
    images: list[np.ndarray]
    own: tuple[float, float]
    random: np.ndarray
    # Correlation of edges with those of the content: of the result, and of the style.
    edges: tuple[float, float]


Found = list[Transfer]


def filters() -> Array:
    """In the Fourier domain, (K, H, W): SCALES octaves by ORIENTATIONS, and the rest below.

    Their squares add to 1, so the transposed filters invert them (a tight frame, as in the
    steerable pyramid of Simoncelli & Freeman 1995).
    """
    height, width = HEIGHT + 2 * PADDING, WIDTH + 2 * PADDING
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    octave = np.log2(np.maximum(np.hypot(y, x), 1e-9) / 0.5)
    angles = np.arctan2(y, x) - np.pi * np.arange(ORIENTATIONS)[:, None, None] / ORIENTATIONS
    oriented = np.cos(angles) ** (2 * ORIENTATIONS - 2)
    oriented = np.sqrt(oriented / oriented.sum(0))
    found, above = [], np.ones_like(octave)
    for scale in range(SCALES):
        below = np.cos(np.pi / 2 * np.clip(octave + scale + 1.5, 0, 1))
        found += list(np.sqrt(np.maximum(above**2 - below**2, 0)) * oriented)
        above = below
    return jnp.asarray(np.stack([*found, above]), jnp.float32)


def analyze(image: Array) -> Array:
    """Features (1, H, W, 3 K) of an image (H, W, 3), with PADDING on each side."""
    padded = jnp.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)), mode="reflect")
    spectrum = jnp.fft.fft2(padded @ COLORS.T.astype(np.float32), axes=(0, 1))
    bands = jnp.fft.ifft2(spectrum * filters()[..., None], axes=(1, 2)).real
    return jnp.moveaxis(bands, 0, -1).reshape(1, *padded.shape[:2], -1)


def synthesize(features: Array) -> Array:
    """The inverse of `analyze`."""
    bands = jnp.moveaxis(features.reshape(*features.shape[1:3], 3, -1), -1, 0)
    spectrum = (jnp.fft.fft2(bands, axes=(1, 2)) * filters()[..., None]).sum(0)
    padded = jnp.fft.ifft2(spectrum, axes=(0, 1)).real
    return (padded @ COLORS.astype(np.float32))[PADDING:-PADDING, PADDING:-PADDING]


def inside() -> Array:
    """True where a feature belongs to the image, not to the padding, (1, H, W, 1)."""
    return jnp.pad(jnp.ones((1, HEIGHT, WIDTH, 1), bool), ((0, 0), *[(PADDING,) * 2] * 2, (0, 0)))


def statistics(features: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """Mean and deviation of each feature, (C,)."""
    moments = normjax.measure(features, (0, 1, 2), mask)
    return moments.mean, jnp.sqrt(moments.variance())


@jax.jit
def transfer(content: Array, style: Array) -> Array:
    """The content, each of its features with the mean and the deviation of the style's."""
    mean, deviation = statistics(analyze(style), inside())
    # instance_norm of epsilon 0 then scale and bias: AdaIN.
    features = normjax.instance_norm(analyze(content), deviation, mean, epsilon=0, mask=inside())
    return jnp.clip(synthesize(features), 0, 1)


def random_features(image: Array, seed: int) -> list[Array]:
    """Two convolutions of He's deviation with ReLU, untrained."""
    keys = jax.random.split(jax.random.key(seed))
    x, found = image[None] - 0.5, []
    for key, shape in zip(keys, ((7, 7, 3, 32), (5, 5, 32, 64)), strict=True):
        kernel = jax.random.normal(key, shape) * np.sqrt(2 / np.prod(shape[:3]))
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=dimensions)
        )
        found.append(x)
    return found


def distance(of: tuple[Array, Array], style: tuple[Array, Array]) -> Array:
    """Root mean square over features of the differences of mean and deviation, in deviations."""
    (mean, deviation), (style_mean, style_deviation) = of, style
    squares = (mean - style_mean) ** 2 + (deviation - style_deviation) ** 2
    return jnp.sqrt(jnp.mean(squares / (style_deviation**2 + 1e-6)))


@jax.jit
def own_distance(image: Array, style: Array) -> Array:
    found, wanted = (statistics(analyze(part), inside()) for part in (image, style))
    return distance(found, wanted)


@partial(jax.jit, static_argnames="seed")
def random_distance(image: Array, style: Array, seed: int) -> Array:
    layers = zip(random_features(image, seed), random_features(style, seed), strict=True)
    return jnp.stack([distance(statistics(a), statistics(b)) for a, b in layers]).mean()


def edges(image: Array) -> Array:
    """How steep the brightness is at each pixel."""
    down, right = jnp.gradient(image.mean(-1))
    return jnp.hypot(down, right).ravel()


def measure(options: Options) -> Found:
    photographs = [
        jax.image.resize(image / np.float32(255), (HEIGHT, WIDTH, 3), "lanczos3").clip(0, 1)
        for image in load_sample_images().images
    ]
    found = []
    for content, style in (photographs, photographs[::-1]):
        result = transfer(content, style)
        own = float(own_distance(content, style)), float(own_distance(result, style))
        random = [
            [float(random_distance(image, style, seed)) for image in (content, result)]
            for seed in range(options.seeds)
        ]
        kept, unrelated = (
            float(jnp.corrcoef(edges(image), edges(content))[0, 1]) for image in (result, style)
        )
        images = [np.asarray(image) for image in (content, style, result)]
        found.append(Transfer(images, own, np.array(random), (kept, unrelated)))
    return found


def conclude(found: Found) -> Conclusion:
    own = [each.own[1] / each.own[0] for each in found]
    random = [float(np.mean(each.random[:, 1] / each.random[:, 0])) for each in found]
    kept = [each.edges[0] for each in found]
    checks = [max(own) < NEAR, max(random) < NEAR, min(kept) > KEPT]
    rows = [
        [
            f"{name} as {other}",
            *(f"{value:.2f}" for value in each.own),
            *(spread(each.random[:, column], 2) for column in range(2)),
            *(f"{value:.2f}" for value in each.edges),
        ]
        for name, other, each in zip(NAMES, NAMES[::-1], found, strict=True)
    ]
    gone = [100 * (1 - ratio) for ratio in (*own, *random)]
    return Conclusion(
        held="yes" if all(checks) else "partly" if any(checks[:2]) else "no",
        number=f"{min(gone[:2]):.0f} % of the distance gone, edges correlate {min(kept):.2f}",
        text=(
            f"Photographs are split into {3 * (SCALES * ORIENTATIONS + 1)} features (color, scale, "
            f"orientation) without training; each is normalized to the mean and variance that it "
            f"has in the other photograph. {gone[0]:.0f} % and {gone[1]:.0f} % of the distance to "
            f"the style's statistics are gone ({gone[2]:.0f} % and {gone[3]:.0f} % in the features "
            f"of a random network that took no part), and the edges correlate {kept[0]:.2f} and "
            f"{kept[1]:.2f} with those of the content. The result takes over color, contrast "
            "and sharpness, but no texture."
        ),
        header=[
            "content as style", "distance before", "after", "in a random network before", "after",
            "edges, result and content", "edges, style and content",
        ],
        rows=rows,
    )  # fmt: skip


def draw(figure: Figure, found: Found) -> None:
    figure.set_size_inches(12, 6.2)
    panels = figure.subplots(2, 3)
    for row, each in zip(panels, found, strict=True):
        gone = 100 * (1 - each.own[1] / each.own[0])
        result = f"result: {gone:.0f} % nearer, edges correlate {each.edges[0]:.2f}"
        titles = ("content", "style", result)
        for panel, title, image in zip(row, titles, each.images, strict=True):
            panel.imshow(image)
            panel.set_title(title)
            panel.set_axis_off()
    figure.suptitle("Content with the mean and variance of each feature of the style")


if __name__ == "__main__":
    evidence.main(CLAIM, measure, conclude, draw, seeds=5)
