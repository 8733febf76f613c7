"""The table of all norms, swept by tests/test_laws.py. A public norm missing here fails a test."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import normjax
import normjax.linen


@dataclass(frozen=True)
class Norm:
    """How a law calls one norm: `call(x, mask)` returns the output alone."""

    public: object
    call: Callable
    shape: tuple[int, ...] = (6, 4, 3)

    @property
    def mask_shape(self):
        return (*self.shape[:-1], 1)


def function_call(train: bool):
    def call(x, mask=None):
        stats = normjax.BatchStats(jnp.array([1.0, 0, -1]), jnp.array([1.0, 2, 3]))
        scale, bias = jnp.array([1.0, 2, 0.5]), jnp.array([0.0, 1, -1])
        return normjax.batch_norm(x, stats, scale, bias, train=train, mask=mask)[0]

    return call


def module_call(module):
    def call(x, mask=None):
        # Asked for by name, since Flax promotes half precision input to the parameters' dtype.
        dtype = jnp.asarray(x).dtype
        sized = module.clone(dtype=dtype if jnp.issubdtype(dtype, jnp.inexact) else None)
        variables = sized.init(jax.random.key(0), jnp.ones(Norm.shape), train=False)
        return sized.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])[0]

    return call


def plain_normalize(x, mask=None):
    return normjax.normalize(x, 0.5, 2.0, jnp.array([1.0, 2, 0.5]), mask=mask)


NORMS = {
    "batch_norm, train": Norm(normjax.batch_norm, function_call(True)),
    "batch_norm, eval": Norm(normjax.batch_norm, function_call(False)),
    "normalize": Norm(normjax.normalize, plain_normalize),
    "linen.BatchNorm": Norm(normjax.linen.BatchNorm, module_call(normjax.linen.BatchNorm())),
    "linen.BatchNorm, exact average": Norm(
        normjax.linen.BatchNorm, module_call(normjax.linen.BatchNorm(momentum=None, ddof=1))
    ),
}
