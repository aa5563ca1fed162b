"""What all batches that follow the gradient have in common: bounds, pace, and what survives a restart."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import Field

from components.errors import InputError
from components.units import Count, PositiveCount, Tokens

ROUNDING = 1e-12
"""Relative slack of the growth limit, so that 45 * 1.4, in floats a little less, may be 63."""


class Progress(Protocol):
    @property
    def samples(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class GradientNoise(Protocol):
    """What recipes/contracts.py says of a measured step."""

    @property
    def groups(self) -> int: ...
    @property
    def group_samples(self) -> int: ...
    @property
    def sum_of_squares(self) -> float: ...
    @property
    def mean_square(self) -> float: ...
    @property
    def noise(self) -> float: ...
    @property
    def signal(self) -> float: ...


@dataclass(kw_only=True)
class Adaptive(ABC):
    """A batch that grows, or also shrinks, to a target measured in the gradient.

    A kind of it says what the target is; bounds, pace and memory are here. Decisions are Python arithmetic on numbers
    that are equal on every rank, so they are equal, too.
    """

    initial: PositiveCount
    """Global batch size of the first step, in samples (sequences)."""
    maximum: PositiveCount
    """Largest global batch size, in samples."""
    minimum: PositiveCount | None = None
    """Smallest global batch size, in samples, for one that may shrink; unset: initial. Keep it at two micro-batches or
    more: the noise of a single one cannot be measured, so a batch that shrank to it would stay there."""
    quantum: PositiveCount = 1
    """Sizes are multiples of this, rounded up; it has to divide initial, minimum and maximum."""
    max_growth: Annotated[float, Field(gt=1)] | None = None
    """Largest factor of one change, either way; unset: no limit."""
    cooldown_samples: Count = 0
    """Samples to be trained after a change before the next."""
    hysteresis: Annotated[float, Field(ge=0)] = 0.0
    """A target that differs from the current size by less than this share of it changes nothing."""
    shrink: bool = False
    """Follow the target down, too; false: the batch never gets smaller."""
    delay_tokens: Tokens = 0
    """Tokens to be trained before the first decision: gradients of the warm-up say little about those after it."""
    measure_at_maximum: bool = True
    """Measure also when a batch that never shrinks has reached its maximum, for the metrics alone."""

    def __post_init__(self) -> None:
        if self.minimum is not None and self.minimum > self.initial:
            raise InputError("minimum", f"{self.minimum} is above initial = {self.initial}; lower it or raise initial")
        if self.maximum < self.initial:
            raise InputError("maximum", f"{self.maximum} is below initial = {self.initial}; raise it or lower initial")
        for name, size in (("initial", self.initial), ("minimum", self.minimum), ("maximum", self.maximum)):
            if size is not None and size % self.quantum:
                raise InputError("quantum", f"{self.quantum} does not divide {name} = {size}; make it a multiple")
        if self.max_growth is not None and self._furthest_up(self.smallest) == self.smallest < self.maximum:
            needed = 1 + self.quantum / self.smallest
            raise InputError(
                "max_growth",
                f"{self.max_growth} x {self.smallest} samples falls short of the next multiple of "
                f"quantum = {self.quantum}, so the batch could never grow; make it {needed:.4g} or more",
            )
        if self.shrink and not self.measure_at_maximum:
            raise InputError("measure_at_maximum", "false would keep the batch at its maximum, but shrink is true")
        self._size = self.initial
        self._changed_at: int | None = None

    @abstractmethod
    def target(self, noise: GradientNoise) -> float | None:
        """The batch wanted after a step, in samples; None: this step decides nothing."""

    def samples(self, progress: object) -> int:
        return self._size

    def measures(self, progress: object) -> bool:
        return self.measure_at_maximum or self._size < self.maximum

    def observe(self, progress: Progress, noise: GradientNoise | None) -> None:
        if noise is None or progress.tokens < self.delay_tokens:
            return
        if self._changed_at is not None and progress.samples - self._changed_at < self.cooldown_samples:
            return
        # One step that overflowed must not decide the rest of the run.
        if not all(map(math.isfinite, (noise.sum_of_squares, noise.mean_square, noise.noise, noise.signal))):
            return
        target = self.target(noise)
        if target is None or not math.isfinite(target):
            return
        size = self._next(target, batch=noise.groups * noise.group_samples)
        if size != self._size:
            self._size, self._changed_at = size, progress.samples

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._size, "changed_at": self._changed_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also of another policy, which leaves what it does not name as it is, and of other bounds: they hold."""
        self._size = self._within(self._up(int(state.get("samples", self._size))))
        changed_at = state.get("changed_at")
        self._changed_at = None if changed_at is None else int(changed_at)

    def _next(self, target: float, batch: int) -> int:
        """The size after a step of `batch` samples, which the layout may have rounded up from the current size."""
        current = self._size
        wanted = self._up(math.ceil(target))
        grows = target > batch and wanted > current
        shrinks = self.shrink and wanted < current
        # Of the target before the bounds: a maximum that is near must stay in reach.
        if not (grows or shrinks) or abs(wanted - current) < self.hysteresis * current:
            return current
        limited = min(wanted, self._furthest_up(current)) if grows else max(wanted, self._furthest_down(current))
        return self._within(limited)

    @property
    def smallest(self) -> int:
        """What it may come to, in samples."""
        return self.minimum if self.shrink and self.minimum is not None else self.initial

    def _up(self, size: int) -> int:
        return -(-size // self.quantum) * self.quantum

    def _within(self, size: int) -> int:
        return min(max(size, self.smallest), self.maximum)

    def _furthest_up(self, size: int) -> int:
        if self.max_growth is None:
            return self.maximum
        return int(min(size * self.max_growth * (1 + ROUNDING), self.maximum)) // self.quantum * self.quantum

    def _furthest_down(self, size: int) -> int:
        if self.max_growth is None:
            return self.smallest
        return self._up(math.ceil(size / self.max_growth * (1 - ROUNDING)))
