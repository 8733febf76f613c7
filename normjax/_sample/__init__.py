"""Statistics within an example, hence no state: layer, RMS, group and instance norm, and kin."""

from normjax._sample.core import group_norm, instance_norm, layer_norm, rms_norm
from normjax._sample.kin import (
    add_layer_norm,
    add_rms_norm,
    dynamic_tanh,
    filter_response_norm,
    l2_normalize,
    local_response_norm,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "dynamic_tanh",
    "filter_response_norm",
    "group_norm",
    "instance_norm",
    "l2_normalize",
    "layer_norm",
    "local_response_norm",
    "rms_norm",
]
