"""The public functions, a file for each family."""

from normjax._functions.batch import batch_norm
from normjax._functions.group import group_norm, instance_norm
from normjax._functions.inplace import ELU, LeakyReLU, batch_norm_act
from normjax._functions.layer import layer_norm, rms_norm
from normjax._functions.others import (
    dynamic_tanh,
    filter_response_norm,
    l2_normalize,
    local_response_norm,
)
from normjax._functions.renorm import batch_renorm
from normjax._functions.residual import add_layer_norm, add_rms_norm
from normjax._functions.weight import SpectralStats, spectral_norm, standardize_weight, weight_norm

__all__ = [
    "ELU",
    "LeakyReLU",
    "SpectralStats",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_norm_act",
    "batch_renorm",
    "dynamic_tanh",
    "filter_response_norm",
    "group_norm",
    "instance_norm",
    "l2_normalize",
    "layer_norm",
    "local_response_norm",
    "rms_norm",
    "spectral_norm",
    "standardize_weight",
    "weight_norm",
]
