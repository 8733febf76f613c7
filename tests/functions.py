"""Every public function with all of its array arguments, for the laws of transformations.

In tests/descriptors.py a norm is a function of x and a mask. Here each array can be
differentiated, mapped or sharded separately.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

import normjax
from normjax import BatchStats, SpectralStats

SHAPE = (8, 4, 8)
FEATURES = SHAPE[-1]


@dataclass(frozen=True)
class Function:
    """`call(**arrays)` returns an output of the shape of x; `vectors` names the arrays besides x.

    A vector has a value for each feature, "residual" the shape of x, and "alpha" no axis.
    """

    public: object
    call: Callable
    vectors: tuple[str, ...] = ()
    shares: bool = False

    def __call__(self, axis_name=None, **arrays):
        """Shares statistics of the batch over `axis_name`."""
        return self.call(**arrays, **({"axis_name": axis_name} if self.shares else {}))


def running(function, **options):
    """A function with running statistics; their mean and variance are two more arrays."""

    def call(x, mean, var, scale, bias, axis_name):
        stats = BatchStats(mean, var)
        return function(x, stats, scale, bias, axis_name=axis_name, **options)[0]

    return Function(function, call, ("mean", "var", "scale", "bias"), shares=True)


def plain(function, *vectors, **options):
    """A function that takes its arrays by name."""
    return Function(function, lambda x, **arrays: function(x, **arrays, **options), vectors)


def added(function, *vectors):
    """The norm of a sum; both results are used."""

    def call(x, residual, **arrays):
        y, total = function(x, residual, **arrays)
        return y + total

    return Function(function, call, ("residual", *vectors))


def spectral(x, u):
    stats = SpectralStats(u.reshape(1, FEATURES), jnp.ones((), u.dtype))
    return normjax.spectral_norm(x, stats, train=True)[0]


def normalize(x, mean, var, scale, bias):
    one, *rest = (v.reshape(1, 1, FEATURES) for v in (mean, var, scale, bias))
    return normjax.normalize(x, one, *rest)


AFFINE = ("scale", "bias")

FUNCTIONS = {
    "batch_norm, train": running(normjax.batch_norm, train=True),
    "batch_norm, eval": running(normjax.batch_norm, train=False),
    "batch_norm, virtual": running(normjax.batch_norm, train=True, virtual_batch_size=2),
    "batch_renorm": running(normjax.batch_renorm, train=True),
    "batch_norm_act": running(normjax.batch_norm_act, train=True),
    "batch_norm_act, eval": running(normjax.batch_norm_act, train=False),
    "layer_norm": plain(normjax.layer_norm, *AFFINE),
    "rms_norm": plain(normjax.rms_norm, "scale"),
    "group_norm": plain(normjax.group_norm, *AFFINE, num_groups=4),
    "instance_norm": plain(normjax.instance_norm, *AFFINE),
    "add_layer_norm": added(normjax.add_layer_norm, *AFFINE),
    "add_rms_norm": added(normjax.add_rms_norm, "scale"),
    "filter_response_norm": plain(normjax.filter_response_norm, *AFFINE, "threshold"),
    "dynamic_tanh": plain(normjax.dynamic_tanh, "alpha", *AFFINE),
    "local_response_norm": plain(normjax.local_response_norm),
    "l2_normalize": plain(normjax.l2_normalize),
    "normalize": Function(normjax.normalize, normalize, ("mean", "var", *AFFINE)),
    "weight_norm": Function(
        normjax.weight_norm, lambda x, scale: normjax.weight_norm(x, scale), ("scale",)
    ),
    "standardize_weight": Function(
        normjax.standardize_weight, lambda x, gain: normjax.standardize_weight(x, gain), ("gain",)
    ),
    "spectral_norm": Function(normjax.spectral_norm, spectral, ("u",)),
}


def arrays(name, rng, shape=SHAPE):
    """Arguments of a function by name, as NumPy float32; variances are positive."""
    sizes = {"residual": shape, "alpha": ()}
    named = {
        vector: np.float32(rng.random(sizes.get(vector, (FEATURES,))) + 0.5)
        for vector in FUNCTIONS[name].vectors
    }
    return {"x": rng.normal(1, 2, shape).astype(np.float32), **named}
