"""`flax.nnx` modules over the functions of normjax, drop-ins for those of Flax.

They read and store `Param` and `BatchStat` variables, and do no arithmetic.
"""

from normjax.nnx._accumulate import empty_batch_moments, move_batch_stats
from normjax.nnx._batch import BatchMoments, BatchNorm, BatchNormAct, BatchRenorm
from normjax.nnx._others import (
    AddLayerNorm,
    AddRMSNorm,
    DynamicTanh,
    FilterResponseNorm,
    LocalResponseNorm,
)
from normjax.nnx._weight import SpectralNorm, WeightNorm, WeightStandardized
from normjax.nnx._within import GroupNorm, InstanceNorm, LayerNorm, RMSNorm

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchMoments",
    "BatchNorm",
    "BatchNormAct",
    "BatchRenorm",
    "DynamicTanh",
    "FilterResponseNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LocalResponseNorm",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
    "WeightStandardized",
    "empty_batch_moments",
    "move_batch_stats",
]
