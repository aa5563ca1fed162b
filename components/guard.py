"""[guard]: steps whose loss or gradient is bad are recognised before they touch the parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from components.units import PositiveCount

Action = Literal["stop", "skip", "roll_back"]
SampleAction = Literal["stop", "skip"]

_LEAST_DEVIATION = 1e-3
"""Of the mean: a loss that has hardly moved so far is not to be held to rounding errors."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """[guard]: what becomes of a step whose numbers are not finite, whose loss leaps up, or that has a bad sample.

    stop: end the run. skip: leave the update of that step out. roll_back: besides, return parameters and optimizer to
    the newest checkpoint, while the data goes on after the samples of the bad step (PaLM, arXiv 2204.02311, 5.1).
    """

    on_nonfinite: Action = "stop"
    """A loss or gradient norm that is not finite."""
    on_spike: Action | None = None
    """A loss above `spike_std`; unset: such a step is one like any other."""
    on_bad_sample: SampleAction = "stop"
    """A sample that cannot be read or holds no valid token ids. skip: go on after the samples of that step."""
    spike_std: Annotated[float, Field(gt=0)] = 6.0
    """Standard deviations above the mean of the steps before that make a loss a spike."""
    spike_window_steps: PositiveCount = 100
    """Steps after which a loss has lost 63 % of its weight in mean and deviation, and before which none is a spike."""
    max_bad_steps: PositiveCount = 10
    """Bad steps in a row that end the run, whatever else is said."""

    def build(self) -> StepGuard:
        return StepGuard(self)


@dataclass(frozen=True)
class BadStep:
    """Why a step is not to be trusted, and what to do."""

    action: Action
    finite: bool
    why: str
    """Its numbers in words."""


@dataclass
class StepGuard:
    """Judges every step from numbers that are equal on all ranks. What is bad never enters what it compares with."""

    rules: GuardConfig
    consecutive: int = field(default=0, init=False)
    """Bad steps since the last good one."""
    _mean: float = field(default=0.0, init=False)
    _variance: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    def judge(self, loss: float, grad_norm: float) -> BadStep | None:
        """What is wrong with a step of this mean loss and gradient norm; None: nothing."""
        bad = self._bad(loss, grad_norm)
        if bad is None:
            self.consecutive = 0
            self._remember(loss)
            return None
        return self._count(bad)

    def judge_samples(self, why: str) -> BadStep:
        """What to do with a step that has a bad sample, on any rank; `why` says which."""
        return self._count(BadStep(self.rules.on_bad_sample, True, why))

    def _count(self, bad: BadStep) -> BadStep:
        """`bad`, or the stop that is due after too many bad steps in a row.

        A step that stops the run is not counted: the state that is saved is the one before it.
        """
        consecutive = self.consecutive + 1
        if bad.action == "stop":
            return bad
        if consecutive >= self.rules.max_bad_steps:
            why = f"{bad.why}; bad steps in a row: {consecutive}, which is guard.max_bad_steps"
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

    def _bad(self, loss: float, grad_norm: float) -> BadStep | None:
        numbers = f"loss {loss:.6g}, gradient norm {grad_norm:.6g}"
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return BadStep(self.rules.on_nonfinite, False, numbers)
        if self.rules.on_spike is None or self._steps < self.rules.spike_window_steps:
            return None
        deviation = max(math.sqrt(self._variance), _LEAST_DEVIATION * abs(self._mean))
        above = (loss - self._mean) / deviation if deviation else 0.0
        if above <= self.rules.spike_std:
            return None
        return BadStep(
            self.rules.on_spike, True, f"{numbers}, {above:.3g} standard deviations above the mean of {self._mean:.6g}"
        )

    def _remember(self, loss: float) -> None:
        """Exponential mean and variance (West 1979), of all steps alike while they are few."""
        self._steps += 1
        share = max(1 / self._steps, 1 - math.exp(-1 / self.rules.spike_window_steps))
        off = loss - self._mean
        self._mean += share * off
        self._variance = (1 - share) * (self._variance + share * off * off)
