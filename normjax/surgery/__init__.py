"""What is done to a trained model: fold it for serving, choose what decays."""

from normjax.surgery._decay import decay_mask
from normjax.surgery._fold import FoldReport, fold

__all__ = ["FoldReport", "decay_mask", "fold"]
