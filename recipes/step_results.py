"""A step that was queued on the device, and its results on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from components.batch import StepBatch, StepTime
from components.clock import TrainingClock
from components.gradient_noise import GradientMoments
from components.gradient_noise.moments import Norm
from components.guard import BadStep, GuardConfig
from components.interrupts import NONE, REQUESTS
from components.train_step import StepSums, TrainStep
from recipes.probe_runner import ProbeResults


@dataclass(frozen=True)
class StepResult:
    """The results of a step on the host, equal on all ranks."""

    loss: float
    """The mean loss over the tokens of the step."""
    grad_norm: float
    """The gradient norm before clipping."""
    moments: Mapping[Norm, GradientMoments]
    """The gradient moments in the norms in which they were measured."""
    model_sums: Tensor | None
    """The metric sums of the model, (n,); see `recipes.interfaces.ReportsMetrics`."""
    request: int
    """The largest request of all processes."""
    step_time: StepTime | None = None
    """The time of an earlier step, which was reduced with this one; None if there was none to reduce."""


@dataclass
class LaunchedStep:
    """What the host knows of a step after queueing it."""

    progress: TrainingClock
    """The clock after the step."""
    batch: StepBatch
    lr: float
    numbers: StepSums | None
    """The results on the device; None for a step that was skipped because of a bad sample."""
    dp_size: int
    measured: bool
    data_seconds: float
    timed: StepTime | None = None
    """The time of an earlier step on this process; its mean over all processes is in `numbers`."""
    policy_metrics: Mapping[str, float] = field(default_factory=dict)
    """How the batch policy explains the size of this step."""
    probed: ProbeResults | None = None
    """The numbers of the probes; None for a step without any."""
    bad: BadStep | None = None
    """What the guard found; None for a good step, and for one that is not checked yet."""

    @property
    def first_sample(self) -> int:
        return self.progress.samples - self.batch.samples

    @property
    def tokens(self) -> int:
        """Tokens of the step, over all ranks."""
        return self.batch.samples * self.progress.sequence_length

    def read(self) -> StepResult:
        """Wait until the device has computed the gradient of this step, and return its results."""
        if self.numbers is None:
            return StepResult(math.nan, math.nan, {}, None, NONE)
        numbers = self.numbers.read()
        grad_sq_norm, micro_sq_norms, *in_adam = numbers["squares"].tolist()
        groups = self.batch.micro_batches * self.dp_size
        measured: dict[Norm, tuple[float, float]] = {"l2": (grad_sq_norm, micro_sq_norms)} if self.measured else {}
        if in_adam and in_adam[1]:  # 0 before the first update
            measured["adam"] = in_adam[0], in_adam[1]
        moments = {
            norm: GradientMoments.from_sums(
                *sums, num_micro_batches=groups, micro_batch_size=self.batch.samples // groups
            )
            for norm, sums in measured.items()
        }
        made = numbers["requests"].nonzero()
        step_time = self.timed and replace(self.timed, seconds=float(numbers["step_seconds"]))
        return StepResult(
            loss=float(numbers["loss"]) / self.tokens,
            grad_norm=float(torch.tensor(grad_sq_norm, dtype=torch.float64).sqrt()),
            moments=moments,
            model_sums=numbers.get("model"),
            request=REQUESTS[int(made[-1])] if len(made) else NONE,
            step_time=step_time,
        )


def request_counts(request: int, device: torch.device) -> Tensor:
    """Return (n,) float64 zeros with 1 at the index of `request`. Summed over processes, the last nonzero entry is the
    largest request.
    """
    counts = torch.zeros(len(REQUESTS), dtype=torch.float64, device=device)
    counts[REQUESTS.index(request)].fill_(1)
    return counts


def metrics_delay(device: torch.device, step: TrainStep, guard: GuardConfig) -> int:
    """Return the number of steps between launching a step and reading its results.

    1 on a GPU: the host launches a step while the device computes the previous one, and the device itself skips a step
    that is not finite. 0 if the host must check a step before its update: for `guard.on_spike`, and for an optimizer
    that cannot skip a step on the device. 0 on a CPU, where there is nothing to overlap.
    """
    return int(device.type == "cuda" and step.skips_on_device and guard.on_spike is None)
