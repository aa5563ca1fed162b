"""A batch that grows in fixed stages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field

from components.batch.policy import BatchPolicy, Progress
from components.errors import InputError
from components.units import PositiveCount, Tokens


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the ramp."""

    from_tokens: Tokens | None = None
    """The stage begins with the first step that starts at or after this many tokens; excludes from_fraction."""
    from_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The same, as a fraction of training.total_tokens; excludes from_tokens."""
    samples: PositiveCount
    """Global batch size of the stage, in samples (sequences)."""

    def __post_init__(self) -> None:
        if (self.from_tokens is None) == (self.from_fraction is None):
            raise InputError(
                "from_tokens", "a stage starts at from_tokens or at from_fraction; set exactly one of the two"
            )

    def start_tokens(self, total_tokens: int) -> float:
        """Return the tokens at which the stage starts."""
        return self.from_tokens if self.from_tokens is not None else (self.from_fraction or 0.0) * total_tokens


@dataclass(frozen=True, kw_only=True)
class Ramp(BatchPolicy):
    """Stages by trained tokens. A pure function of the clock, so a resumed run needs no state."""

    initial_size: PositiveCount
    """Global batch size before the first stage, in samples (sequences)."""
    stages: list[Stage]
    """The stages, in order of tokens; all by from_tokens or all by from_fraction."""
    linear: bool = False
    """Grow linearly in tokens between stages, instead of jumping at the start of each."""
    multiple_of: PositiveCount = 1
    """Linear sizes are rounded to the nearest multiple of this; it must divide initial_size and every stage."""

    def __post_init__(self) -> None:
        by_fraction = [stage.from_fraction is not None for stage in self.stages]
        if any(by_fraction) and not all(by_fraction):
            raise InputError(
                "stages", "some start at from_tokens and some at from_fraction; use the same key in all stages"
            )
        starts = [stage.from_fraction if stage.from_tokens is None else stage.from_tokens for stage in self.stages]
        for earlier, later in pairwise(starts):
            assert earlier is not None and later is not None
            if later <= earlier:
                raise InputError("stages", f"each must start after the one before it, but {later} follows {earlier}")
        if self.multiple_of > 1 and not self.linear:
            raise InputError("multiple_of", "only applies with linear = true; remove it, or set linear = true")
        for size in (self.initial_size, *(stage.samples for stage in self.stages)):
            if size % self.multiple_of:
                raise InputError(
                    "multiple_of",
                    f"{self.multiple_of} does not divide a batch of {size}; make the batch a multiple of it",
                )

    def build(self, *, schedule: Any, sequence_length: int, total_tokens: int) -> BatchPolicy:
        """Return the policy: itself, because it has no state."""
        return self

    def next_batch_size(self, progress: Progress) -> int:
        since, size = 0.0, self.initial_size
        for stage in self.stages:
            start = stage.start_tokens(progress.total_tokens)
            if start > progress.tokens:
                return self._between(size, stage.samples, (progress.tokens - since) / (start - since))
            since, size = start, stage.samples
        return size

    def _between(self, earlier: int, later: int, fraction: float) -> int:
        if not self.linear:
            return earlier
        size = earlier + fraction * (later - earlier)
        return int(size / self.multiple_of + 0.5) * self.multiple_of
