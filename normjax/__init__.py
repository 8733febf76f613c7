"""Normalization for JAX: pure functions that return their result and their new state.

The whole library is one idea carried through: moments are a monoid. Measure the data, merge
the moments, normalize by them. The Flax modules over these functions live in `normjax.linen`,
which is imported on its own so that `import normjax` needs no Flax.
"""

from normjax._batch import batch_norm, batch_renorm
from normjax._moments import Moments, measure, merge, synchronize
from normjax._normalize import normalize
from normjax._sample import group_norm, instance_norm, layer_norm, rms_norm
from normjax._stats import BatchStats
from normjax._weight import SpectralStats, spectral_norm, standardize_weight, weight_norm

__version__ = "0.1.0"

__all__ = [
    "BatchStats",
    "Moments",
    "SpectralStats",
    "batch_norm",
    "batch_renorm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "measure",
    "merge",
    "normalize",
    "rms_norm",
    "spectral_norm",
    "standardize_weight",
    "synchronize",
    "weight_norm",
]
