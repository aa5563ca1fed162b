"""[optimizer]: AdamW and Muon."""

from components.optimizers.adamw import AdamW
from components.optimizers.muon import Muon

__all__ = ["AdamW", "Muon"]
