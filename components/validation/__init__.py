"""Validation: loss, perplexity and bits per byte of a model on text that it was not trained on.

`Validator` evaluates packed sequences, as in training; `SlidingWindow` evaluates whole documents.
"""

from components.validation.sliding_window import Documents, SlidingWindow
from components.validation.totals import LossTotals, UnreadableError
from components.validation.validator import ValidationConfig, Validator

__all__ = ["Documents", "LossTotals", "SlidingWindow", "UnreadableError", "ValidationConfig", "Validator"]
