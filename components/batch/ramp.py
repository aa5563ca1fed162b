"""A batch that grows in stages fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from components.quantities import PositiveCount, Tokens


class HasTokens(Protocol):
    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the ramp."""

    from_tokens: Tokens
    """The stage holds from the first step that starts at or after this many tokens."""
    samples: PositiveCount
    """Global batch size of the stage, in samples (sequences)."""


@dataclass(kw_only=True)
class Ramp:
    """Stages by trained tokens: a pure function of the clock, so a resumed run needs no state."""

    initial: PositiveCount
    """Global batch size before the first stage, in samples (sequences)."""
    stages: list[Stage]
    """What follows, in order of tokens."""

    def __post_init__(self) -> None:
        starts = [stage.from_tokens for stage in self.stages]
        for earlier, later in pairwise(starts):
            if later <= earlier:
                raise ValueError(f"stages: each must start after the one before it, but {later} follows {earlier}")

    def samples(self, progress: HasTokens) -> int:
        reached = [stage.samples for stage in self.stages if stage.from_tokens <= progress.tokens]
        return reached[-1] if reached else self.initial

    def measures(self, progress: object) -> bool:
        return True

    def observe(self, progress: object, noise: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
