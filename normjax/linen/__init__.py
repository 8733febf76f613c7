"""`flax.linen` modules over the functions of normjax, drop-ins for those of Flax.

They read and store `params` and `batch_stats`, and do no arithmetic.
"""

from normjax.linen._accumulate import empty_batch_moments, move_batch_stats
from normjax.linen._adapter import MissingStatsError
from normjax.linen._batch import BatchNorm, BatchNormAct, BatchRenorm, ImmutableBatchStatsError
from normjax.linen._others import (
    AddLayerNorm,
    AddRMSNorm,
    DynamicTanh,
    FilterResponseNorm,
    LocalResponseNorm,
)
from normjax.linen._weight import SpectralNorm, WeightNorm, WeightStandardized
from normjax.linen._within import GroupNorm, InstanceNorm, LayerNorm, RMSNorm

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm",
    "BatchNormAct",
    "BatchRenorm",
    "DynamicTanh",
    "FilterResponseNorm",
    "GroupNorm",
    "ImmutableBatchStatsError",
    "InstanceNorm",
    "LayerNorm",
    "LocalResponseNorm",
    "MissingStatsError",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
    "WeightStandardized",
    "empty_batch_moments",
    "move_batch_stats",
]
