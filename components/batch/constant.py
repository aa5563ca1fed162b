"""The constant batch."""

from __future__ import annotations

from dataclasses import dataclass

from components.batch.planned import Planned
from components.units import PositiveCount


@dataclass(kw_only=True)
class Constant(Planned):
    """The same global batch size at every step."""

    initial: PositiveCount
    """Global batch size, in samples (sequences)."""

    def samples(self, progress: object) -> int:
        return self.initial
