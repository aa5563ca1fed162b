"""LossTotals: the sums of an evaluation, and the metrics computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass


class UnreadableError(ValueError):
    """A sequence cannot be read, or contains invalid token ids.

    It is raised after the last forward pass, because all ranks must take part in each.
    """


@dataclass(frozen=True)
class LossTotals:
    """Sums over the predicted tokens, including end-of-document tokens."""

    nats: float
    tokens: int
    bytes: int
    """UTF-8 bytes of the text of these tokens."""

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text, comparable between tokenizers; infinity without text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.inf

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Return the three means by their names in a row of metrics, each with `prefix`."""
        means = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {f"{prefix}{name}": value for name, value in means.items()}
