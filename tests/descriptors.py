"""The table of all norms, swept by tests/test_laws.py. A public norm missing here fails a test."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx

import normjax
import normjax.linen
import normjax.nnx


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


@cache
def initialized(module, terms=1, **mode):
    """Variables as concrete arrays, also during a trace; they do not depend on the dtype of x."""
    with jax.ensure_compile_time_eval():
        one = jnp.ones(Norm.shape, jnp.float32)
        return module.init(jax.random.key(0), *[one] * terms, **mode)


def module_call(module, **mode):
    def call(x, mask=None):
        # Explicit, since Flax promotes half precision input to the parameters' dtype.
        dtype = jnp.asarray(x).dtype
        sized = module.clone(dtype=dtype if jnp.issubdtype(dtype, jnp.inexact) else None)
        variables = initialized(module, **mode)
        return sized.apply(variables, x, mask=mask, mutable=["batch_stats"], **mode)[0]

    return call


def affine_call(function, *vectors, **options):
    def call(x, mask=None):
        return function(x, *vectors, mask=mask, **options)

    return call


def plain_normalize(x, mask=None):
    return normjax.normalize(x, 0.5, 2.0, jnp.array([1.0, 2, 0.5]), mask=mask)


def stateful(function):
    """Passes fixed running statistics to a function; returns the output alone."""

    def call(x, scale, bias, **options):
        stats = normjax.BatchStats(jnp.array([1.0, 0, -1]), jnp.array([1.0, 2, 3]))
        return function(x, stats, scale, bias, **options)[0]

    return call


def added(function, *vectors):
    """Passes zeros as residual; adding another residual would round x."""

    def call(x, mask=None):
        return function(x, jnp.zeros_like(x), *vectors, mask=mask)[0]

    return call


def added_module(module):
    def call(x, mask=None):
        dtype = jnp.asarray(x).dtype
        sized = module.clone(dtype=dtype if jnp.issubdtype(dtype, jnp.inexact) else None)
        variables = initialized(module, terms=2)
        return sized.apply(variables, x, jnp.zeros_like(x), mask=mask)[0]

    return call


def nnx_call(kind, *args, terms=1, **options):
    """A module of NNX, built outside of any trace, as a function of x alone."""

    @cache
    def parts(dtype):
        with jax.ensure_compile_time_eval():
            return nnx.split(kind(*args, dtype=dtype, rngs=nnx.Rngs(0), **options))

    def call(x, mask=None):
        dtype = jnp.asarray(x).dtype
        graph, state = parts(dtype if jnp.issubdtype(dtype, jnp.inexact) else None)
        module = nnx.merge(graph, state, copy=True)
        y = module(x, *[jnp.zeros_like(x)] * (terms - 1), mask=mask)
        return y if terms == 1 else y[0]

    return call


SCALE, BIAS = jnp.array([1.0, 2, 0.5]), jnp.array([0.0, 1, -1])


def unmasked_call(function, *vectors, **options):
    def call(x, mask=None):
        assert mask is None
        return function(x, *vectors, **options)

    return call


def spectral_call(x, mask=None):
    assert mask is None
    stats = normjax.SpectralStats(jnp.ones((1, 3)), jnp.ones(()))
    return normjax.spectral_norm(x, stats, train=True)[0]


# Norms without a mask; test_weight.py and test_other_norms.py test most of their laws.
PLAIN = {
    "weight_norm": Norm(normjax.weight_norm, unmasked_call(normjax.weight_norm, SCALE)),
    "standardize_weight": Norm(
        normjax.standardize_weight, unmasked_call(normjax.standardize_weight, SCALE)
    ),
    "spectral_norm": Norm(normjax.spectral_norm, spectral_call),
    "l2_normalize": Norm(normjax.l2_normalize, unmasked_call(normjax.l2_normalize)),
    "local_response_norm": Norm(
        normjax.local_response_norm, unmasked_call(normjax.local_response_norm, alpha=0.5)
    ),
    "dynamic_tanh": Norm(
        normjax.dynamic_tanh, unmasked_call(normjax.dynamic_tanh, 0.5, SCALE, BIAS)
    ),
}
UNMASKED = {norm.public for norm in PLAIN.values()} | {
    getattr(module, name)
    for module in (normjax.linen, normjax.nnx)
    for name in (
        "DynamicTanh",
        "LocalResponseNorm",
        "WeightNorm",
        "SpectralNorm",
        "WeightStandardized",
    )
}

NORMS = {
    "batch_norm, train": Norm(normjax.batch_norm, function_call(True)),
    "batch_norm, eval": Norm(normjax.batch_norm, function_call(False)),
    "batch_norm, virtual": Norm(
        normjax.batch_norm,
        affine_call(stateful(normjax.batch_norm), SCALE, BIAS, train=True, virtual_batch_size=2),
    ),
    "batch_renorm": Norm(
        normjax.batch_renorm, affine_call(stateful(normjax.batch_renorm), SCALE, BIAS, train=True)
    ),
    "linen.BatchRenorm": Norm(
        normjax.linen.BatchRenorm, module_call(normjax.linen.BatchRenorm(), train=True)
    ),
    "batch_norm_act": Norm(
        normjax.batch_norm_act,
        affine_call(stateful(normjax.batch_norm_act), SCALE, BIAS, train=True),
    ),
    "batch_norm_act, eval": Norm(
        normjax.batch_norm_act,
        affine_call(stateful(normjax.batch_norm_act), SCALE, BIAS, train=False),
    ),
    "linen.BatchNormAct": Norm(
        normjax.linen.BatchNormAct,
        module_call(normjax.linen.BatchNormAct(activation=normjax.ELU()), train=True),
    ),
    "normalize": Norm(normjax.normalize, plain_normalize),
    "layer_norm": Norm(normjax.layer_norm, affine_call(normjax.layer_norm, SCALE, BIAS)),
    "rms_norm": Norm(normjax.rms_norm, affine_call(normjax.rms_norm, SCALE)),
    "group_norm": Norm(
        normjax.group_norm, affine_call(normjax.group_norm, SCALE, BIAS, num_groups=1)
    ),
    "instance_norm": Norm(normjax.instance_norm, affine_call(normjax.instance_norm, SCALE, BIAS)),
    "add_layer_norm": Norm(normjax.add_layer_norm, added(normjax.add_layer_norm, SCALE, BIAS)),
    "add_rms_norm": Norm(normjax.add_rms_norm, added(normjax.add_rms_norm, SCALE)),
    "linen.AddLayerNorm": Norm(
        normjax.linen.AddLayerNorm, added_module(normjax.linen.AddLayerNorm())
    ),
    "linen.AddRMSNorm": Norm(normjax.linen.AddRMSNorm, added_module(normjax.linen.AddRMSNorm())),
    "filter_response_norm": Norm(
        normjax.filter_response_norm,
        affine_call(normjax.filter_response_norm, SCALE, BIAS),
    ),
    "filter_response_norm, threshold": Norm(
        normjax.filter_response_norm,
        affine_call(normjax.filter_response_norm, SCALE, BIAS, jnp.array([0.0, -1, 0.5])),
    ),
    "linen.FilterResponseNorm": Norm(
        normjax.linen.FilterResponseNorm,
        module_call(normjax.linen.FilterResponseNorm(use_threshold=False)),
    ),
    "linen.BatchNorm": Norm(
        normjax.linen.BatchNorm, module_call(normjax.linen.BatchNorm(), train=True)
    ),
    "linen.BatchNorm, exact average": Norm(
        normjax.linen.BatchNorm,
        module_call(normjax.linen.BatchNorm(momentum=None, ddof=1), train=True),
    ),
    "linen.LayerNorm": Norm(normjax.linen.LayerNorm, module_call(normjax.linen.LayerNorm())),
    "linen.RMSNorm": Norm(normjax.linen.RMSNorm, module_call(normjax.linen.RMSNorm())),
    "linen.GroupNorm": Norm(
        normjax.linen.GroupNorm,
        module_call(normjax.linen.GroupNorm(num_groups=None, group_size=1)),
    ),
    "linen.InstanceNorm": Norm(
        normjax.linen.InstanceNorm, module_call(normjax.linen.InstanceNorm())
    ),
    "nnx.BatchNorm": Norm(normjax.nnx.BatchNorm, nnx_call(normjax.nnx.BatchNorm, 3)),
    "nnx.BatchNorm, exact average": Norm(
        normjax.nnx.BatchNorm, nnx_call(normjax.nnx.BatchNorm, 3, momentum=None, ddof=1)
    ),
    "nnx.BatchNormAct": Norm(
        normjax.nnx.BatchNormAct, nnx_call(normjax.nnx.BatchNormAct, 3, activation=normjax.ELU())
    ),
    "nnx.BatchRenorm": Norm(normjax.nnx.BatchRenorm, nnx_call(normjax.nnx.BatchRenorm, 3)),
    "nnx.LayerNorm": Norm(normjax.nnx.LayerNorm, nnx_call(normjax.nnx.LayerNorm, 3)),
    "nnx.RMSNorm": Norm(normjax.nnx.RMSNorm, nnx_call(normjax.nnx.RMSNorm, 3)),
    "nnx.GroupNorm": Norm(
        normjax.nnx.GroupNorm, nnx_call(normjax.nnx.GroupNorm, 3, num_groups=None, group_size=1)
    ),
    "nnx.InstanceNorm": Norm(normjax.nnx.InstanceNorm, nnx_call(normjax.nnx.InstanceNorm, 3)),
    "nnx.AddLayerNorm": Norm(
        normjax.nnx.AddLayerNorm, nnx_call(normjax.nnx.AddLayerNorm, 3, terms=2)
    ),
    "nnx.AddRMSNorm": Norm(normjax.nnx.AddRMSNorm, nnx_call(normjax.nnx.AddRMSNorm, 3, terms=2)),
    "nnx.FilterResponseNorm": Norm(
        normjax.nnx.FilterResponseNorm,
        nnx_call(normjax.nnx.FilterResponseNorm, 3, use_threshold=False),
    ),
}

# Adapters contain no arithmetic (tests/test_architecture.py). They are tested for what they pass to
# the functions: x and its dtype, the mask, errors.
ADAPTERS = {name for name in NORMS if name.startswith(("linen.", "nnx."))}
