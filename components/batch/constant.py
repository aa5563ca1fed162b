"""The constant batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components.quantities import PositiveCount


@dataclass(kw_only=True)
class Constant:
    """The same global batch size at every step."""

    initial: PositiveCount
    """Global batch size, in samples (sequences)."""

    def samples(self, progress: object) -> int:
        return self.initial

    def measures(self, progress: object) -> bool:
        return True

    def observe(self, progress: object, noise: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
