"""[optimizer]: AdamW and Muon.

adamw.py             AdamW, and its second moment at a changing batch
muon.py              the keys of Muon, and which parameters it updates
muon_step.py         the step of Muon: momentum, orthogonalization, update
orthogonalize.py     the Newton-Schulz iteration and its coefficients
matrix_exchange.py   sends shards of matrices to the process that updates them, and back
parameter_groups.py  groups by weight decay and learning-rate multiplier
"""

from components.optimizers.adamw import AdamW
from components.optimizers.muon import Muon

__all__ = ["AdamW", "Muon"]
