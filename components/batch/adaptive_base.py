"""The base of all adaptive batch policies: bounds, pace, and the state that a resumed run needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from components.batch.policy import BatchPolicy, Progress, check_sizes
from components.errors import InputError
from components.gradient_noise.moments import GradientNoise, Norm
from components.units import Count, PositiveCount, Tokens

ROUNDING = 1e-12
"""Relative slack of the growth limit, so that 45 * 1.4, which is slightly below 63 in floats, allows 63."""


@dataclass(frozen=True, kw_only=True)
class Adaptive(ABC):
    """A batch that grows, and optionally shrinks, to a target computed from the measured gradient noise.

    A subclass defines the target; bounds and pace are defined here, and `AdaptivePolicy` holds the state. Decisions are
    Python arithmetic on numbers that are equal on every rank, so all ranks decide the same.
    """

    initial_size: PositiveCount
    """Global batch size of the first step, in samples (sequences)."""
    max_size: PositiveCount
    """Largest global batch size, in samples."""
    min_size: PositiveCount | None = None
    """Smallest global batch size, in samples, with shrink = true; unset: initial_size. Use at least two micro-batches:
    gradient noise cannot be measured from a single one, so a batch that shrank to it would stay there."""
    multiple_of: PositiveCount = 1
    """Sizes are rounded up to multiples of this; it must divide initial_size, min_size and max_size."""
    max_growth: Annotated[float, Field(gt=1)] | None = None
    """Largest factor of one change, up or down; unset: no limit."""
    cooldown_samples: Count = 0
    """Samples to train after a change before the next one."""
    hysteresis: Annotated[float, Field(ge=0)] = 0.0
    """Relative dead band: a target that differs from the current size by less than this fraction is ignored."""
    shrink: bool = False
    """Whether the batch may also get smaller; false: it only grows."""
    delay_tokens: Tokens = 0
    """Tokens to train before the first decision: the noise of the warm-up does not predict what follows."""
    norm: Norm = "l2"
    """Norm of the gradients whose noise is followed: "l2", or "adam" if [gradient_noise] norms has it."""

    def __post_init__(self) -> None:
        if self.min_size is not None and self.min_size > self.initial_size:
            raise InputError(
                "min_size",
                f"{self.min_size} is above initial_size = {self.initial_size}; lower it or raise initial_size",
            )
        check_sizes(self.initial_size, self.max_size, self.multiple_of, self.min_size)
        if self.max_growth is not None and self.max_next(self.smallest) == self.smallest < self.max_size:
            needed = 1 + self.multiple_of / self.smallest
            raise InputError(
                "max_growth",
                f"{self.max_growth} x {self.smallest} samples is below the next multiple of "
                f"multiple_of = {self.multiple_of}, so the batch could never grow; use {needed:.4g} or more",
            )

    @abstractmethod
    def target(self, noise: GradientNoise) -> float | None:
        """Return the wanted global batch size after a step, in samples, or None to leave it unchanged."""

    def build(self, *, schedule: Any, sequence_length: int, total_tokens: int) -> BatchPolicy:
        """Return the policy of one run, at the initial size."""
        return AdaptivePolicy(self)

    @property
    def smallest(self) -> int:
        """Smallest size that the policy may return, in samples."""
        return self.min_size if self.shrink and self.min_size is not None else self.initial_size

    def next_size(self, current: int, target: float, batch: int) -> int:
        """Return the size after a step of `batch` samples, which may have been rounded up from the `current` size."""
        wanted = self._round_up(math.ceil(target))
        grows = target > batch and wanted > current
        shrinks = self.shrink and wanted < current
        # Compare before clamping: otherwise hysteresis would keep the batch from reaching a bound that is near.
        if not (grows or shrinks) or abs(wanted - current) < self.hysteresis * current:
            return current
        limited = min(wanted, self.max_next(current)) if grows else max(wanted, self.min_next(current))
        return self._clamp(limited)

    def bounded(self, size: int) -> int:
        """Return `size` rounded up to a multiple of `multiple_of` and clamped to the bounds."""
        return self._clamp(self._round_up(size))

    def max_next(self, size: int) -> int:
        """Return the largest size that may follow `size`."""
        if self.max_growth is None:
            return self.max_size
        return int(min(size * self.max_growth * (1 + ROUNDING), self.max_size)) // self.multiple_of * self.multiple_of

    def min_next(self, size: int) -> int:
        """Return the smallest size that may follow `size`, not clamped to the bounds."""
        if self.max_growth is None:
            return self.smallest
        return self._round_up(math.ceil(size / self.max_growth * (1 - ROUNDING)))

    def _round_up(self, size: int) -> int:
        return -(-size // self.multiple_of) * self.multiple_of

    def _clamp(self, size: int) -> int:
        return min(max(size, self.smallest), self.max_size)


class AdaptivePolicy(BatchPolicy):
    """The state of an adaptive batch: its current size, and the sample count at its last change."""

    is_adaptive = True

    def __init__(self, config: Adaptive) -> None:
        self.config = config
        self.min_size, self.max_size, self.multiple_of = config.smallest, config.max_size, config.multiple_of
        self._size = config.initial_size
        self._changed_at: int | None = None

    def next_batch_size(self, progress: Progress) -> int:
        return self._size

    def observe(self, progress: Progress, noise: GradientNoise | None) -> None:
        noise = noise and noise.in_norm(self.config.norm)
        if noise is None or progress.tokens < self.config.delay_tokens:
            return
        if self._changed_at is not None and progress.samples - self._changed_at < self.config.cooldown_samples:
            return
        # A step that overflowed must not decide the batch size of the rest of the run.
        moments = noise.moments
        numbers = (moments.sum_micro_grad_sq_norms, moments.mean_grad_sq_norm, noise.grad_cov_trace, noise.grad_sq_norm)
        if not all(map(math.isfinite, numbers)):
            return
        target = self.target(noise)
        if target is None or not math.isfinite(target):
            return
        size = self.config.next_size(self._size, target, batch=moments.samples)
        if size != self._size:
            self._size, self._changed_at = size, progress.samples

    def target(self, noise: GradientNoise) -> float | None:
        """Return the wanted size; see `Adaptive.target`."""
        return self.config.target(noise)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._size, "changed_at": self._changed_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state, also that of another policy, and clamp the size to the current bounds.

        Without `samples` the size is kept; without `changed_at` no change is remembered.
        """
        self._size = self.config.bounded(int(state.get("samples", self._size)))
        changed_at = state.get("changed_at")
        self._changed_at = None if changed_at is None else int(changed_at)
