"""What an evaluation adds up, and who adds it up."""

from __future__ import annotations

import math
from dataclasses import dataclass


class UnreadableError(ValueError):
    """A sequence cannot be read, or holds no token ids.

    It is raised after the last forward pass, because other ranks take part in each.
    """


@dataclass(frozen=True)
class LossTotals:
    """Of the predicted tokens, end-of-document ones included."""

    nats: float
    tokens: int
    bytes: int
    """UTF-8 bytes those tokens stand for."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.inf
