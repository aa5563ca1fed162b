"""A step whose work the device was given, and what it told once the device had done it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from components.batch import StepBatch
from components.clock import TrainingClock
from components.gradient_noise import GradientMoments
from components.interrupts import NONE, REQUESTS
from components.train_step import StepSums


@dataclass(frozen=True)
class StepResult:
    """The numbers of a step on the host, equal on all ranks."""

    loss: float
    """Mean over the tokens of the step."""
    grad_norm: float
    """Before clipping."""
    moments: GradientMoments | None
    """None where they were not measured."""
    model_sums: Tensor | None
    """The model's own, see `recipes.interfaces.ReportsMetrics`."""
    request: int
    """The largest request of all processes."""


@dataclass(frozen=True)
class LaunchedStep:
    """What the host knows of a step when it has launched it."""

    progress: TrainingClock
    """As it is after the step."""
    batch: StepBatch
    lr: float
    numbers: StepSums | None
    """None for a step that was skipped for a bad sample."""
    dp_size: int
    measured: bool
    data_seconds: float

    @property
    def first_sample(self) -> int:
        return self.progress.samples - self.batch.samples

    def read(self) -> StepResult:
        """Waits until the device has computed the gradient of this step."""
        if self.numbers is None:
            return StepResult(math.nan, math.nan, None, None, NONE)
        numbers = self.numbers.read()
        grad_sq_norm, micro_sq_norms = numbers["squares"].tolist()
        moments = None
        if self.measured:
            groups = self.batch.micro_batches * self.dp_size
            moments = GradientMoments.from_sums(
                grad_sq_norm,
                micro_sq_norms,
                num_micro_batches=groups,
                dp_size=self.dp_size,
                micro_batch_size=self.batch.samples // groups,
            )
        made = numbers["requests"].nonzero()
        return StepResult(
            loss=float(numbers["loss"]) / (self.batch.samples * self.progress.sequence_length),
            grad_norm=float(torch.tensor(grad_sq_norm, dtype=torch.float64).sqrt()),
            moments=moments,
            model_sums=numbers.get("model"),
            request=REQUESTS[int(made[-1])] if len(made) else NONE,
        )


def request_counts(request: int, device: torch.device) -> Tensor:
    """(n,) float64, 1 at the place of `request`. Added up over processes, the last that is not 0 is the largest."""
    counts = torch.zeros(len(REQUESTS), dtype=torch.float64, device=device)
    counts[REQUESTS.index(request)].fill_(1)
    return counts
