"""How the next token is chosen from its logits.

B rows, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from components.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature first, then the `top_k` most probable, then the fewest of those that make up `top_p`.

    The order is that of `transformers`. `temperature` 0 takes the most probable token.
    """

    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Choose among this many."""
    top_p: float | None = None
    """Choose among the most probable that together have at least this probability (arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", f"{self.temperature} is no number from 0 on")
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k", f"{self.top_k} leaves nothing to choose from; use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError("top_p", f"{self.top_p} is no probability above 0")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """(B,) ids, by inverting the distribution function at `uniform_B`, float64 in [0, 1).

        The same numbers choose the same tokens on any device, in any batch. Greedy, they are not looked at.
        """
        if self.is_greedy:
            return logits_BV.argmax(-1)
        exact = logits_BV.double()
        # from the largest on: a quotient by next to nothing may be - infinity, and not + infinity
        exact = (exact - exact.amax(-1, keepdim=True)) / self.temperature
        ids_BV: Tensor | None = None
        if self.top_k is not None and self.top_k < exact.shape[-1]:
            exact, ids_BV = exact.topk(self.top_k)
        elif self.top_p is not None:
            exact, ids_BV = exact.sort(descending=True, stable=True)
        summed_BV = exact.softmax(-1, dtype=torch.float64).cumsum(-1)
        total_B1 = summed_BV[:, -1:]
        if self.top_p is not None:
            last_B1 = (summed_BV < self.top_p).sum(-1, keepdim=True).clamp(max=summed_BV.shape[-1] - 1)
            total_B1 = summed_BV.gather(-1, last_B1)
        # The first whose sum is above the point: never one of probability zero.
        place_B1 = torch.searchsorted(summed_BV, uniform_B.unsqueeze(-1) * total_B1, right=True)
        place_B1 = place_B1.clamp(max=summed_BV.shape[-1] - 1)
        return (place_B1 if ids_BV is None else ids_BV.gather(-1, place_B1)).squeeze(-1)


def uniform_numbers(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1): what one text draws from."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
