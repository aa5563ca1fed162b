"""Seesaw: the batch grows where the learning rate would fall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field

from components.batch.policy import BatchPolicy, Progress
from components.errors import InputError
from components.units import PositiveCount


class Schedule(Protocol):
    """The part of [lr_schedule] that is used here."""

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
    """Where [lr_schedule] alone would cut the rate by `factor`, cut it by its root and multiply the batch by `factor`.

    (arXiv 2510.14717.) The batch is set here, from the schedule at the batch `initial`; the rate follows it by the
    schedule's batch_scaling = "sqrt", whose reference_batch_tokens are those of `initial`. Rate / sqrt(batch) is then that
    of the schedule at every step, for any factor. Past the maximum the batch is constant, and the rate falls as the
    schedule does.

    A pure function of tokens and schedule: a resumed run needs no state. One that is extended asks the schedule of the
    longer run, whose rate is higher, and may fall back to a smaller batch.
    """

    initial_size: PositiveCount
    """Global batch size at the schedule's peak, in samples (sequences)."""
    max_size: PositiveCount
    """Largest global batch size, in samples. Keep it below the critical batch, where the exchange stops being fair."""
    factor: Annotated[float, Field(gt=1)] = 2.0
    """The batch grows each time the schedule has fallen by this factor."""
    multiple_of: PositiveCount = 1
    """Sizes are rounded up to multiples of this; it has to divide initial and maximum."""

    def __post_init__(self) -> None:
        if self.max_size < self.initial_size:
            raise InputError(
                "max_size",
                f"{self.max_size} is below initial_size = {self.initial_size}; raise it or lower initial_size",
            )
        for name, size in (("initial_size", self.initial_size), ("max_size", self.max_size)):
            if size % self.multiple_of:
                raise InputError(
                    "multiple_of", f"{self.multiple_of} does not divide {name} = {size}; make it a multiple"
                )

    def build(self, *, schedule: Schedule, sequence_length: int, total_tokens: int) -> BatchPolicy:
        """Return the policy of one run. Raises ValueError when the learning rate would not follow the batch."""
        name = type(schedule).__name__
        if schedule.max_lr is None or schedule.batch_scaling is None:
            raise InputError(
                "use", f"Seesaw needs a schedule with max_lr and batch_scaling, and {name} lacks one of them"
            )
        reference = self.initial_size * sequence_length
        rule, given = schedule.batch_scaling, schedule.reference_batch_tokens
        if (rule, given) != ("sqrt", reference):
            raise InputError(
                "use",
                f'Seesaw needs lr_schedule.batch_scaling = "sqrt" with reference_batch_tokens = {reference}, the '
                f"tokens of its initial batch, and {name} has {rule!r} with {given}",
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
        # The learning rate of the warm-up is below the peak too, but rising.
        if progress.tokens < self.schedule.warmup_tokens:
            return config.initial_size
        # At its own reference batch the schedule's rule is a factor of 1: this is the learning rate without Seesaw.
        lr = self.schedule.lr(progress.tokens, self.reference_batch_tokens, progress.total_tokens)
        size, next_lr = float(config.initial_size), self.max_lr / config.factor
        while size < config.max_size and lr <= next_lr:  # ends at the maximum also for a learning rate of zero
            size, next_lr = size * config.factor, next_lr / config.factor
        return min(-int(-size // config.multiple_of) * config.multiple_of, config.max_size)
