"""[optimizer]: AdamW and Muon.

adamw.py                AdamW, its parameter groups, and its second moment at a changing batch
stochastic_rounding.py  rounds the first moment to bf16 at random, equally in all replicas
muon.py                 the keys of Muon, and which parameters it updates
muon_step.py            the step of Muon: momentum, orthogonalization, update
orthogonalize.py        the Newton-Schulz iteration and its coefficients
matrix_exchange.py      sends shards of matrices to the process that updates them, and back
"""

from components.optimizers.adamw import AdamW
from components.optimizers.muon import Muon

__all__ = ["AdamW", "Muon"]
