"""How well a model predicts text it has not seen: loss, perplexity and bits per byte.

Over packed sequences, as in training, or over whole documents with a window that slides.
"""

from components.validation.sliding_window import Documents, SlidingWindow
from components.validation.totals import LossTotals, UnreadableError
from components.validation.validator import ValidationConfig, Validator

__all__ = ["Documents", "LossTotals", "SlidingWindow", "UnreadableError", "ValidationConfig", "Validator"]
