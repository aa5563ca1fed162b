"""How well a model predicts text it has not seen: loss, perplexity and bits per byte.

Over packed sequences, as in training, or over whole documents with a window that slides.
"""

from components.validation.held_out import HeldOut, Validation
from components.validation.sliding_window import Documents, SlidingWindow
from components.validation.totals import Ranks, Totals, UnreadableError

__all__ = ["Documents", "HeldOut", "Ranks", "SlidingWindow", "Totals", "UnreadableError", "Validation"]
