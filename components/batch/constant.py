"""A constant batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components.batch.policy import BatchPolicy, Progress
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class Constant(BatchPolicy):
    """The same global batch size at every step."""

    initial_size: PositiveCount
    """Global batch size, in samples (sequences)."""

    def build(self, *, schedule: Any, sequence_length: int, total_tokens: int) -> BatchPolicy:
        """Return the policy: itself, because it has no state."""
        return self

    def next_batch_size(self, progress: Progress) -> int:
        return self.initial_size
