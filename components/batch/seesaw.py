"""Seesaw: grow the batch where the schedule would lower the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field

from components.batch.policy import BatchPolicy, Progress, check_sizes
from components.errors import InputError
from components.units import PositiveCount


class Schedule(Protocol):
    """The members of [lr_schedule] that Seesaw uses."""

    @property
    def max_lr(self) -> float | None: ...
    @property
    def warmup_tokens(self) -> int: ...
    @property
    def batch_scaling(self) -> str | None: ...
    @property
    def reference_batch_tokens(self) -> int | None: ...

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Seesaw:
    """Multiply the batch by `factor` and the learning rate by 1/sqrt(factor) where [lr_schedule] alone divides the
    learning rate by `factor` (arXiv 2510.14717).

    The batch size is computed from the schedule at `initial_size`. The schedule's batch_scaling = "sqrt", with the
    tokens of `initial_size` as reference_batch_tokens, raises the learning rate with the batch, so lr / sqrt(batch)
    equals that of the schedule at every step, for any factor. At max_size the batch stays, and lr falls as scheduled.

    A pure function of tokens and schedule, so a resumed run needs no state. An extended run uses the schedule of the
    longer run, whose learning rate is higher, and may return to a smaller batch.
    """

    initial_size: PositiveCount
    """Global batch size at the schedule's peak, in samples (sequences)."""
    max_size: PositiveCount
    """Largest global batch size, in samples. Keep it below the critical batch size: above it, a larger batch no longer
    replaces a lower learning rate."""
    factor: Annotated[float, Field(gt=1)] = 2.0
    """The batch grows by this factor each time the scheduled learning rate has fallen by it."""
    multiple_of: PositiveCount = 1
    """Sizes are rounded up to multiples of this; it must divide initial_size and max_size."""

    def __post_init__(self) -> None:
        check_sizes(self.initial_size, self.max_size, self.multiple_of)

    def build(self, *, schedule: Schedule, sequence_length: int, total_tokens: int) -> BatchPolicy:
        """Return the policy of one run. Raises InputError if the schedule does not scale with the batch as required."""
        name = type(schedule).__name__
        if schedule.max_lr is None or schedule.batch_scaling is None:
            raise InputError(
                "use", f"Seesaw needs a schedule with max_lr and batch_scaling; {name} lacks at least one of them"
            )
        reference = self.initial_size * sequence_length
        rule, given = schedule.batch_scaling, schedule.reference_batch_tokens
        if (rule, given) != ("sqrt", reference):
            raise InputError(
                "use",
                f'Seesaw needs lr_schedule.batch_scaling = "sqrt" with reference_batch_tokens = {reference}, the '
                f"tokens of its initial batch; {name} has {rule!r} with {given}",
            )
        return SeesawPolicy(self, schedule, schedule.max_lr, reference)


@dataclass(frozen=True)
class SeesawPolicy(BatchPolicy):
    """Seesaw under the schedule of one run."""

    config: Seesaw
    schedule: Schedule
    max_lr: float
    reference_batch_tokens: int

    def next_batch_size(self, progress: Progress) -> int:
        config = self.config
        # During warm-up the learning rate is below the peak too, but it rises: keep the initial batch.
        if progress.tokens < self.schedule.warmup_tokens:
            return config.initial_size
        # At the reference batch, batch_scaling is a factor of 1: this is the learning rate without Seesaw.
        lr = self.schedule.lr(progress.tokens, self.reference_batch_tokens, progress.total_tokens)
        size, next_lr = float(config.initial_size), self.max_lr / config.factor
        while size < config.max_size and lr <= next_lr:  # max_size ends the loop for a learning rate of zero
            size, next_lr = size * config.factor, next_lr / config.factor
        return min(-int(-size // config.multiple_of) * config.multiple_of, config.max_size)
