"""The clock: how far a run has come. The only truth about progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TrainingClock:
    """Counts optimizer steps, samples (sequences) and tokens consumed by the optimizer.

    Tokens follow from samples, so a step counter times a batch size, which is wrong as soon as the batch changes, is
    never needed. Schedules, policies and the data loader's cursor all read this one object.
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
        """One optimizer step consumed `samples` sequences."""
        self.step += 1
        self.samples += samples

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "samples": self.samples, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the saved tokens are not samples x sequence_length: another sequence length."""
        step, samples, tokens = (int(state[key]) for key in ("step", "samples", "tokens"))
        if tokens != samples * self.sequence_length:
            raise ValueError(
                f"the checkpoint counts {tokens} tokens in {samples} samples, which is not this run's "
                f"sequence_length of {self.sequence_length}"
            )
        self.step, self.samples = step, samples
