"""[guard]: detect steps with a bad loss or gradient before they update the parameters, and decide what to do.

recipes/bad_steps.py carries out the decision: skip, roll back or stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from components.units import PositiveCount

Action = Literal["stop", "skip", "roll_back"]
SampleAction = Literal["stop", "skip"]

_MIN_RELATIVE_STD = 1e-3
"""Smallest standard deviation, relative to the mean, so that rounding errors of a constant loss are not spikes."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """[guard]: what to do with a step that has a loss or gradient that is not finite, a loss spike, or a bad sample.

    stop: end the run. skip: skip the update of that step. roll_back: skip, and also restore parameters and optimizer
    from the newest checkpoint; the data continues after the samples of the bad step (PaLM, arXiv 2204.02311, 5.1).
    """

    on_nonfinite: Action = "stop"
    """A loss or gradient norm that is not finite."""
    on_spike: Action | None = None
    """A loss spike, as defined by `spike_std`; unset: spikes are not detected."""
    on_bad_sample: SampleAction = "stop"
    """A sample that cannot be read or has invalid token ids. skip: continue after the samples of that step."""
    spike_std: Annotated[float, Field(gt=0)] = 6.0
    """A loss is a spike if it is more than this many standard deviations above the mean of the steps before."""
    spike_window_steps: PositiveCount = 100
    """Steps after which the weight of a loss in mean and deviation is 1/e, and before which no spike is detected."""
    max_bad_steps: PositiveCount = 10
    """Consecutive bad steps that end the run, whatever the action."""

    def build(self) -> StepGuard:
        return StepGuard(self)


@dataclass(frozen=True)
class BadStep:
    """A bad step: what is wrong with it, and what to do."""

    action: Action
    finite: bool
    """Whether loss and gradient norm are finite."""
    why: str
    """Description for the log, with the loss and the gradient norm."""


@dataclass
class StepGuard:
    """Checks every step, from values that are equal on all ranks. Bad steps do not enter the running statistics."""

    rules: GuardConfig
    consecutive: int = field(default=0, init=False)
    """Bad steps since the last good one."""
    _mean: float = field(default=0.0, init=False)
    _variance: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    def check(self, loss: float, grad_norm: float) -> BadStep | None:
        """Return what is wrong with a step of this mean loss and gradient norm, or None if nothing is."""
        bad = self._classify(loss, grad_norm)
        if bad is None:
            self.consecutive = 0
            self._update_statistics(loss)
            return None
        return self._count_bad_step(bad)

    def count_bad_sample(self, why: str) -> BadStep:
        """Count a step that has a bad sample on any rank, described by `why`, and return what to do."""
        return self._count_bad_step(BadStep(self.rules.on_bad_sample, True, why))

    def _count_bad_step(self, bad: BadStep) -> BadStep:
        """Return `bad`, or a stop after `max_bad_steps` consecutive bad steps.

        A step that stops the run is not counted, because the run saves the state before it.
        """
        consecutive = self.consecutive + 1
        if bad.action == "stop":
            return bad
        if consecutive >= self.rules.max_bad_steps:
            why = f"{bad.why}; consecutive bad steps: {consecutive}, which is guard.max_bad_steps"
            return BadStep("stop", bad.finite, why)
        self.consecutive = consecutive
        return bad

    def state_dict(self) -> dict[str, Any]:
        return {
            "consecutive": self.consecutive,
            "mean": self._mean,
            "variance": self._variance,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consecutive, self._steps = int(state["consecutive"]), int(state["steps"])
        self._mean, self._variance = float(state["mean"]), float(state["variance"])

    def _classify(self, loss: float, grad_norm: float) -> BadStep | None:
        numbers = f"loss {loss:.6g}, gradient norm {grad_norm:.6g}"
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return BadStep(self.rules.on_nonfinite, False, numbers)
        if self.rules.on_spike is None or self._steps < self.rules.spike_window_steps:
            return None
        deviation = max(math.sqrt(self._variance), _MIN_RELATIVE_STD * abs(self._mean))
        above = (loss - self._mean) / deviation if deviation else 0.0
        if above <= self.rules.spike_std:
            return None
        return BadStep(
            self.rules.on_spike, True, f"{numbers}, {above:.3g} standard deviations above the mean of {self._mean:.6g}"
        )

    def _update_statistics(self, loss: float) -> None:
        """Update the exponential mean and variance (West 1979); the first steps are weighted equally."""
        self._steps += 1
        weight = max(1 / self._steps, 1 - math.exp(-1 / self.rules.spike_window_steps))
        delta = loss - self._mean
        self._mean += weight * delta
        self._variance = (1 - weight) * (self._variance + weight * delta * delta)
