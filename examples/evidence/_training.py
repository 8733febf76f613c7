"""What the evidence scripts train on and with: handwritten digits, a plain network, SGD.

All is a pure function of its arguments, so that `jax.vmap` trains one network for each seed and
each learning rate at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# params, state, images, labels, key -> loss, new state
Loss = Callable[[Any, Any, Array, Array, Array], tuple[Array, Any]]


class Digits(NamedTuple):
    """1,797 images of handwritten digits, (N, 8, 8, 1) with mean 0 and deviation 1, split once."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@cache
def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8, 1)
    images = (images - images.mean()) / images.std()
    # Lists or arrays, as scikit-learn has it for its type checker.
    parts: Any = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = parts
    return Digits(train, train_labels, test, test_labels)


class Trained(NamedTuple):
    """A trained network, and the loss before each step."""

    params: Any
    state: Any
    losses: Array


def train(
    loss: Loss,
    params: Any,
    state: Any,
    key: Array,
    *,
    steps: int,
    batch_size: int,
    optimizer: optax.GradientTransformation,
    images: Array | np.ndarray | None = None,
    labels: Array | np.ndarray | None = None,
) -> Trained:
    """`steps` of `optimizer` on random batches of the images (default: digits() for training)."""
    data = digits()
    images = jnp.asarray(data.images if images is None else images)
    labels = jnp.asarray(data.labels if labels is None else labels)

    def step(carry: tuple[Any, Any, Any], key: Array) -> tuple[tuple[Any, Any, Any], Array]:
        params, state, moving = carry
        of_batch, of_loss = jax.random.split(key)
        chosen = jax.random.randint(of_batch, (batch_size,), 0, len(images))
        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, state, images[chosen], labels[chosen], of_loss
        )
        updates, moving = optimizer.update(gradient, moving, params)
        return (optax.apply_updates(params, updates), state, moving), value

    carry = (params, state, optimizer.init(params))
    (params, state, _), losses = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return Trained(params, state, losses)


def cross_entropy(logits: Array, labels: Array) -> Array:
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def accuracy(logits: Array, labels: Array | np.ndarray) -> Array:
    return jnp.mean(jnp.argmax(logits, -1) == labels)


def dense_layers(key: Array, sizes: list[int], gain: float | Array = 1.0) -> list[dict[str, Array]]:
    """Weights of He's deviation times `gain`, He et al. 2015 (arXiv:1502.01852); zero biases.

    With `scale` and `shift` for a norm after the product.
    """
    layers = []
    keys = jax.random.split(key, len(sizes) - 1)
    for layer_key, (fan_in, features) in zip(keys, pairwise(sizes), strict=True):
        weight = jax.random.normal(layer_key, (fan_in, features)) * gain * jnp.sqrt(2 / fan_in)
        layers.append(
            {
                "weight": weight,
                "bias": jnp.zeros(features),
                "scale": jnp.ones(features),
                "shift": jnp.zeros(features),
            }
        )
    return layers
