"""Tools for trained models: diagnose, recompute, freeze, convert, import, export and fold.

They take variables of linen and functions that run a linen model, or models of NNX. The models may
use the layers of Flax only. Nothing is changed in place.
"""

from normjax.surgery._convert import convert
from normjax.surgery._decay import decay_mask
from normjax.surgery._diagnose import diagnose
from normjax.surgery._fold import FoldReport, fold
from normjax.surgery._guard import guard
from normjax.surgery._keras import export_keras, import_keras
from normjax.surgery._modes import freeze, frozen_mask, synchronize
from normjax.surgery._recompute import recompute
from normjax.surgery._report import Finding, NormReport, Report, SeriousFindingError
from normjax.surgery._reset import reset
from normjax.surgery._torch import export_torch, import_torch, torch_fields
from normjax.surgery._torchvision import torchvision_rules

__all__ = [
    "Finding",
    "FoldReport",
    "NormReport",
    "Report",
    "SeriousFindingError",
    "convert",
    "decay_mask",
    "diagnose",
    "export_keras",
    "export_torch",
    "fold",
    "freeze",
    "frozen_mask",
    "guard",
    "import_keras",
    "import_torch",
    "recompute",
    "reset",
    "synchronize",
    "torch_fields",
    "torchvision_rules",
]
