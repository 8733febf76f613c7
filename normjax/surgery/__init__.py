"""What is done to a trained model: fold it for serving, choose what decays, carry it over."""

from normjax.surgery._decay import decay_mask
from normjax.surgery._fold import FoldReport, fold
from normjax.surgery._keras import export_keras, import_keras
from normjax.surgery._torch import export_torch, import_torch, torch_fields

__all__ = [
    "FoldReport",
    "decay_mask",
    "export_keras",
    "export_torch",
    "fold",
    "import_keras",
    "import_torch",
    "torch_fields",
]
