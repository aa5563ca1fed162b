"""The time of a step against its number of micro-batches: a fixed cost plus a cost for each micro-batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from components.batch.policy import StepTime

MIN_TIMES, MAX_TIMES = 8, 32
"""A number of micro-batches is known by its newest 32 steps, from 8 steps on."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step of k micro-batches on every rank: fixed + k x micro_batch."""

    fixed: float
    """Seconds of the optimizer, of communication once per step, and of everything else that does not depend on k."""
    micro_batch: float
    """Seconds of one micro-batch."""
    samples_per_micro_step: int
    """Samples of one micro-batch on every data-parallel rank."""

    def seconds(self, batch: float) -> float:
        """Return the seconds of a step of `batch` samples."""
        return self.fixed + self.micro_batch * batch / self.samples_per_micro_step

    def gain(self, batch: float, now: float, noise_scale: float) -> float:
        """Return how much more progress a second steps of `batch` samples make than steps of `now`: 0.1 is 10 % more.

        Progress, the goodput of Pollux, is samples a second x statistical efficiency.
        """
        faster = batch / now * (self.seconds(now) / self.seconds(batch))
        return faster * ((noise_scale + now) / (noise_scale + batch)) - 1

    def best_batch(self, noise_scale: float) -> float:
        """Return the batch size with the most progress, in samples: sqrt(noise_scale x fixed / seconds of a sample).

        The derivative of log(progress) by b is 1/b - s/(fixed + s b) - 1/(noise_scale + b) for s seconds of a sample.
        It is zero where noise_scale x fixed = s b^2, positive below and negative above.
        """
        sample = self.micro_batch / self.samples_per_micro_step
        return math.sqrt(noise_scale * (self.fixed / sample)) if sample > 0 else math.inf


def efficiency(batch: float, noise_scale: float) -> float:
    """Return the progress of a sample in steps of `batch` samples, relative to that in very small steps."""
    return noise_scale / (noise_scale + batch)


class StepTimes:
    """The times of the latest steps. Those of another layout are dropped."""

    def __init__(self, memory_steps: int) -> None:
        """`memory_steps` is the number of steps after which a time is forgotten."""
        self._layout, self._samples_per_micro_step = "", 0
        self._times: deque[tuple[int, float]] = deque(maxlen=memory_steps)  # micro-batches, seconds
        self._is_current = False

    def add(self, time: StepTime) -> None:
        """Add the time of a step."""
        if time.layout != self._layout:
            self._times.clear()
            self._layout, self._samples_per_micro_step = time.layout, time.samples // time.micro_batches
        self._times.append((time.micro_batches, time.seconds))
        self._is_current = True

    def micro_batches(self, size: int) -> int:
        """Return the micro-batches on every rank of a step of `size` samples. Needs a time."""
        return -(-size // self._samples_per_micro_step)

    def knows(self, size: int) -> bool:
        """Return whether enough steps with the micro-batches of `size` samples were timed."""
        return self._is_current and self.micro_batches(size) in self._typical()

    def fit(self) -> StepCost | None:
        """Return the line with the least relative errors through the typical time of each number of micro-batches.

        Neither cost is negative: if steps do not take longer with more micro-batches, that of a micro-batch is 0.
        Returns None until enough steps with two numbers of micro-batches were timed.
        """
        typical = self._typical()
        if len(typical) < 2 or not self._is_current:
            return None
        points = [(k, seconds, seconds**-2) for k, seconds in typical.items()]
        total = sum(weight for *_, weight in points)
        mean_k = sum(weight * k for k, _, weight in points) / total
        mean_seconds = sum(weight * seconds for _, seconds, weight in points) / total
        covariance = sum(weight * (k - mean_k) * (seconds - mean_seconds) for k, seconds, weight in points)
        slope = max(covariance / sum(weight * (k - mean_k) ** 2 for k, _, weight in points), 0.0)
        fixed = mean_seconds - slope * mean_k
        if fixed < 0:
            fixed, slope = 0.0, fmean(seconds / k for k, seconds, _ in points)
        return StepCost(fixed, slope, self._samples_per_micro_step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "layout": self._layout,
            "samples_per_micro_step": self._samples_per_micro_step,
            "seconds": [list(time) for time in self._times],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the times. They are not used before `add` has shown that the layout is still the same."""
        self._is_current = False
        self._layout, self._samples_per_micro_step = state["layout"], state["samples_per_micro_step"]
        self._times.clear()
        self._times.extend((int(micro_batches), float(seconds)) for micro_batches, seconds in state["seconds"])

    def _typical(self) -> dict[int, float]:
        """Return the typical seconds by number of micro-batches, of the numbers with enough steps.

        It is the lower quartile: what disturbs a step, such as a save or another process, only makes it slower.
        """
        newest: dict[int, list[float]] = {}
        for micro_batches, seconds in reversed(self._times):
            times = newest.setdefault(micro_batches, [])
            if len(times) < MAX_TIMES:
                times.append(seconds)
        return {k: sorted(times)[len(times) // 4] for k, times in newest.items() if len(times) >= MIN_TIMES}
