"""The clock: the progress of a run. All other progress counts are derived from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TrainingClock:
    """Counts optimizer steps, samples (sequences) and tokens consumed by the optimizer.

    Tokens are samples x sequence_length, so progress is never computed as steps x batch size, which is wrong when the
    batch size changes. Schedules, batch policies and the data loader all read this object.
    """

    total_tokens: int
    sequence_length: int
    step: int = 0
    samples: int = 0

    @property
    def tokens(self) -> int:
        return self.samples * self.sequence_length

    @property
    def done(self) -> bool:
        return self.tokens >= self.total_tokens

    def advance(self, samples: int) -> None:
        """Count one optimizer step of `samples` sequences."""
        self.step += 1
        self.samples += samples

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "samples": self.samples, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts. Raises ValueError if the saved tokens are not samples x sequence_length."""
        step, samples, tokens = (int(state[key]) for key in ("step", "samples", "tokens"))
        if tokens != samples * self.sequence_length:
            raise ValueError(
                f"the checkpoint has {tokens} tokens in {samples} samples, which does not match this run's "
                f"sequence_length = {self.sequence_length}; set the old sequence_length, or start a new run"
            )
        self.step, self.samples = step, samples
