"""Times the steps of a run, and reports their mean over all ranks without an extra collective."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from components.batch import StepTime
from recipes.step_results import LaunchedStep


class StepTimer:
    """The timer of the training loop. It is restarted after a save, validation or tasks, which belong to no step.

    A batch policy needs times that are equal on all ranks. The time of a step is known only after its reduction, so it
    is summed over all processes with the results of the next step that is launched.
    """

    def __init__(self, layout: str, world_size: int, first_step: int) -> None:
        """`layout` identifies the mesh and the micro-batch. The step `first_step`, which may compile, is not timed."""
        self._layout, self._world_size, self._first_step = layout, world_size, first_step
        self._started_at = 0.0
        self._latest: StepTime | None = None

    def restart(self) -> None:
        self._started_at = time.perf_counter()

    def stop(self, launched: LaunchedStep) -> float:
        """Return the seconds that this process took for `launched`, since the start."""
        seconds = time.perf_counter() - self._started_at
        if launched.numbers is not None and launched.progress.step != self._first_step:
            batch = launched.batch
            self._latest = StepTime(self._layout, batch.micro_batches, batch.samples, seconds)
        return seconds

    def take(self) -> StepTime | None:
        """Return the time of the latest step on this process, once; None if there is no new one.

        All ranks return the time of the same step.
        """
        latest, self._latest = self._latest, None
        return latest

    def summand(self, timed: StepTime | None, device: torch.device) -> Tensor:
        """Return (1,) float64: what this process adds to the mean of `timed` over all processes."""
        seconds = 0.0 if timed is None else timed.seconds / self._world_size
        return torch.full((1,), seconds, dtype=torch.float64, device=device)
