"""What is done to a trained model: fold it for serving."""

from normjax.surgery._fold import FoldReport, fold

__all__ = ["FoldReport", "fold"]
