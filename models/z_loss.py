"""z-loss: a penalty on the squared log-partition of the output logits (PaLM, arXiv 2204.02311, section 5).

It keeps the logits from drifting, which cross-entropy does not: it is the same for logits that differ by a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ZLoss:
    """The coefficient of the z-loss, and its sum over the tokens of a step. Its gradient is computed in loss.py."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient
        self._sums: Tensor | None = None

    def accumulate(self, log_partition_N: Tensor, counted_N: Tensor) -> None:
        """Add those tokens that are `counted_N`; `log_partition_N` is log sum exp of their logits."""
        squares_N = log_partition_N.double().square()
        sums = torch.stack((squares_N * counted_N, counted_N.double())).sum(-1)
        self._sums = sums if self._sums is None else self._sums + sums

    def pop_sums(self) -> Tensor | None:
        """Return the sum since the last call and its tokens, (2,) float64 on the device, or None, and reset it."""
        sums, self._sums = self._sums, None
        return sums

    def metrics_of(self, sums: Tensor) -> dict[str, float]:
        """Return the mean squared log-partition from `pop_sums`, summed over all processes and on the CPU."""
        total, tokens = sums.tolist()
        return {"z_loss": total / max(tokens, 1)}
