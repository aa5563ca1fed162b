"""A batch with the most progress per second, from measured step times and the gradient noise scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from components.batch.adaptive_base import Adaptive, AdaptivePolicy
from components.batch.policy import BatchPolicy, Progress, StepTime
from components.batch.step_times import StepTimes, efficiency
from components.gradient_noise.moments import GradientNoise
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class Goodput(Adaptive):
    """The batch with the highest goodput, samples per second x statistical efficiency (Pollux, OSDI 2021).

    The efficiency of b samples is B/(B + b) for the noise scale B (arXiv 1812.06162, section 2.2). The seconds of a
    step are measured against its number of micro-batches: a fixed cost plus a cost of each. Without a fixed cost the
    smallest batch is the best. Two costs need two sizes: while the times of only one are known, a few steps take twice
    the samples, or half of them if the batch cannot grow but may shrink.
    """

    min_efficiency: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Smallest efficiency to grow to: the batch is at most B (1/min_efficiency - 1) samples, the noise scale at 0.5."""
    min_gain: Annotated[float, Field(ge=0)] = 0.05
    """Predicted gain in goodput below which the size stays, since step times vary."""
    memory_steps: Annotated[PositiveCount, Field(ge=50)] = 500
    """Steps after which a step time is forgotten. If one size is left, another is tried again."""

    def target(self, noise: GradientNoise) -> float | None:
        """Return the largest size with min_efficiency, in samples; None while the noise scale is unknown."""
        if noise.grad_sq_norm <= 0:
            return None
        size = noise.grad_cov_trace / noise.grad_sq_norm * (1 / self.min_efficiency - 1)
        # rounded down, because next_size rounds up
        return size // self.multiple_of * self.multiple_of

    def build(self, *, schedule: Any, sequence_length: int, total_tokens: int) -> BatchPolicy:
        return GoodputPolicy(self)


class GoodputPolicy(AdaptivePolicy):
    """The state of Goodput: also the step times, and the size that is tried for some steps to measure its time."""

    config: Goodput

    def __init__(self, config: Goodput) -> None:
        super().__init__(config)
        self._times = StepTimes(config.memory_steps)
        self._tried: int | None = None
        self._metrics: dict[str, float] = {}

    def next_batch_size(self, progress: Progress) -> int:
        return self._size if self._tried is None else self._tried

    def observe_time(self, time: StepTime) -> None:
        self._times.add(time)
        if self._tried is not None and self._times.knows(self._tried):
            self._tried = None

    def metrics(self) -> Mapping[str, float]:
        return self._metrics

    def target(self, noise: GradientNoise) -> float | None:
        limit, size = self.config.target(noise), self._size
        if limit is None or not math.isfinite(limit) or noise.grad_cov_trace <= 0:
            return limit
        if (cost := self._times.fit()) is None:
            if self._tried is None and self._times.knows(size):
                self._tried = self._size_to_try(limit)
            return min(limit, size)
        noise_scale = noise.grad_cov_trace / noise.grad_sq_norm
        wanted = self.config.bounded(math.ceil(min(cost.best_batch(noise_scale), limit)))
        gain = cost.gain(wanted, size, noise_scale)
        self._metrics = {
            "goodput_fixed_seconds": cost.fixed,
            "goodput_micro_batch_seconds": cost.micro_batch,
            "goodput_efficiency": efficiency(size, noise_scale),
            "goodput_wanted_size": wanted,
            "goodput_gain": gain,
        }
        return wanted if gain >= self.config.min_gain or size > limit else size

    def _size_to_try(self, limit: float) -> int | None:
        """Return a size with another number of micro-batches than the current one; None if it could not change."""
        config, size = self.config, self._size
        larger = min(config.bounded(int(min(2 * size, limit))), config.max_next(size))
        smaller = max(config.bounded(size // 2), config.min_next(size))
        now = self._times.micro_batches(size)
        if self._times.micro_batches(larger) > now:
            return larger
        return smaller if config.shrink and self._times.micro_batches(smaller) < now else None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"times": self._times.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._tried = None
        if "times" in state:
            self._times.load_state_dict(state["times"])
