"""Validation: loss, perplexity and bits per byte of a model on text that it was not trained on.

validator.py       [validation]: evaluates packed sequences, as in training
sliding_window.py  evaluates whole documents with a stride ([evaluation]: keys method and stride of recipes/evaluate.py)
totals.py          sums of losses and tokens, and the metrics computed from them
"""

from components.validation.sliding_window import Documents, SlidingWindow
from components.validation.totals import LossTotals, UnreadableError
from components.validation.validator import ValidationConfig, Validator

__all__ = ["Documents", "LossTotals", "SlidingWindow", "UnreadableError", "ValidationConfig", "Validator"]
