"""Seesaw: the batch grows where the learning rate would fall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import Field

from components.batch.planned import Planned
from components.errors import InputError
from components.units import PositiveCount


class Progress(Protocol):
    @property
    def tokens(self) -> int: ...
    @property
    def total_tokens(self) -> int: ...


class Schedule(Protocol):
    """What of a schedule is needed; that of the recipe is asked for it."""

    @property
    def max_lr(self) -> float: ...
    @property
    def warmup_tokens(self) -> int: ...

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float: ...


@dataclass(kw_only=True)
class Seesaw(Planned):
    """Where [lr_schedule] alone would cut the rate by `factor`, cut it by its root and multiply the batch by `factor`.

    (arXiv 2510.14717.) The batch is set here, from the schedule at the batch `initial`; the rate follows it by the
    schedule's batch_rule = "sqrt", whose reference_batch_tokens are those of `initial`. Rate / sqrt(batch) is then that
    of the schedule at every step, for any factor. Past the maximum the batch is constant, and the rate falls as the
    schedule does.

    A pure function of tokens and schedule: a resumed run needs no state. One that is extended asks the schedule of the
    longer run, whose rate is higher, and may fall back to a smaller batch.
    """

    initial: PositiveCount
    """Global batch size at the schedule's peak, in samples (sequences)."""
    maximum: PositiveCount
    """Largest global batch size, in samples. Keep it below the critical batch, where the exchange stops being fair."""
    factor: Annotated[float, Field(gt=1)] = 2.0
    """The batch grows each time the schedule has fallen by this factor."""
    quantum: PositiveCount = 1
    """Sizes are rounded up to multiples of this; it has to divide initial and maximum."""

    def __post_init__(self) -> None:
        if self.maximum < self.initial:
            raise InputError("maximum", f"{self.maximum} is below initial = {self.initial}; raise it or lower initial")
        for name, size in (("initial", self.initial), ("maximum", self.maximum)):
            if size % self.quantum:
                raise InputError("quantum", f"{self.quantum} does not divide {name} = {size}; make it a multiple")
        self._schedule: Schedule | None = None
        self._reference = 0

    def follow(self, schedule: Any, *, sequence_length: int, total_tokens: int) -> None:
        """Raises ValueError when the rate would not follow the batch."""
        name = type(schedule).__name__
        if not (hasattr(schedule, "max_lr") and hasattr(schedule, "batch_rule")):
            raise InputError("use", f"Seesaw needs a schedule with max_lr and batch_rule, and {name} has not both")
        reference = self.initial * sequence_length
        rule, given = schedule.batch_rule, getattr(schedule, "reference_batch_tokens", None)
        if (rule, given) != ("sqrt", reference):
            raise ValueError(
                f'use: Seesaw needs lr_schedule.batch_rule = "sqrt" with reference_batch_tokens = {reference}, the '
                f"tokens of its initial batch, and {name} has {rule!r} with {given}"
            )
        self._schedule, self._reference = schedule, reference

    def samples(self, progress: Progress) -> int:
        if self._schedule is None:
            raise RuntimeError("Seesaw was asked for a batch before follow() told it the schedule")
        # The rate of the warm-up is below the peak, too, but rising.
        if progress.tokens < getattr(self._schedule, "warmup_tokens", 0):
            return self.initial
        # At its own reference the schedule's rule is a factor of 1: this is the rate without Seesaw.
        rate = self._schedule.lr(progress.tokens, self._reference, progress.total_tokens)
        size, next_rate = float(self.initial), self._schedule.max_lr / self.factor
        while size < self.maximum and rate <= next_rate:  # ends at the maximum also for a rate of zero
            size, next_rate = size * self.factor, next_rate / self.factor
        return min(-int(-size // self.quantum) * self.quantum, self.maximum)
