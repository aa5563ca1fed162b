"""The launched steps whose results the host has not read yet: reads and logs them, and lets the batch policy observe.

With a delay of 1 (`recipes.step_results.metrics_delay`) a step waits here while the device computes it and the host
launches the next one. Everything that depends on the results of a step happens in `PendingSteps.read`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from components.gradient_noise import GradientNoise
from components.guard import BadStep
from components.interrupts import StopRequests
from components.metrics.logger import MetricLogger
from recipes.errors import raised_in
from recipes.step_metrics import StepMetrics
from recipes.step_results import LaunchedStep, StepResult
from recipes.step_timer import StepTimer
from recipes.training_state import TrainingState


@dataclass
class PendingSteps:
    """The launched steps that are not read yet, the oldest first."""

    delay: int
    """The number of steps that stay unread between two steps."""
    state: TrainingState
    metrics: StepMetrics
    metric_logger: MetricLogger
    timer: StepTimer
    requests: StopRequests
    world_size: int
    _steps: deque[LaunchedStep] = field(init=False, default_factory=deque)

    def append(self, launched: LaunchedStep) -> None:
        self._steps.append(launched)

    def read(self, unread: int = 0) -> list[tuple[BadStep, LaunchedStep]]:
        """Read and log the results of all steps except the last `unread`; return the bad ones of a delayed check.

        If there is one, all steps are read, because the state can be saved or rolled back only after the last one.
        """
        bad_steps: list[tuple[BadStep, LaunchedStep]] = []
        while len(self._steps) > unread:
            launched = self._steps.popleft()
            result = launched.read()
            if self.delay and launched.numbers is not None:  # without a delay it was checked before its update
                launched.bad = self.state.guard.check(result.loss, result.grad_norm)
                if launched.bad is not None:
                    bad_steps.append((launched.bad, launched))
                    unread = 0
            self._record(launched, result)
        return bad_steps

    def _record(self, launched: LaunchedStep, result: StepResult) -> None:
        """Update the noise, log the step, and take over a request that the processes agreed on in it."""
        noise: GradientNoise | None = None
        if result.moments and launched.bad is None:
            noise = self.state.noise.update(launched.progress.samples, result.moments)
        self.state.observations.append((launched.progress, noise))
        if result.step_time is not None:
            with raised_in("batch"):
                self.state.policy.observe_time(result.step_time)
        row = self.metrics.row(launched, result, noise, step_seconds=self.timer.stop(launched))
        self.metric_logger.log(row if launched.probed is None else row | launched.probed.read())
        self.timer.restart()
        # processes agree on a request in the reduction of the step; a single one can poll again
        request = result.request if self.world_size > 1 else self.requests.poll()
        self.requests.agreed = max(self.requests.agreed, request)

    def observe(self) -> None:
        """Let the batch policy observe the steps up to the one launched `delay` steps ago.

        A checkpoint reads steps earlier. They wait in `state.observations`, so that the time at which the policy
        observes a step does not depend on when the run was saved.
        """
        observations = self.state.observations
        while observations and observations[0][0].step <= self.state.clock.step - self.delay:
            with raised_in("batch"):
                self.state.policy.observe(*observations.popleft())
