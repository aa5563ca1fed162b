"""The row of metrics.jsonl of a training step.

A value known on the host is added to `StepMetrics.row`. One that is summed over ranks also needs a line in
`Trainer._summands` (pretrain.py) and in `StepResult` (step_results.py). TensorBoard's groups are TAG_GROUPS of
components/metrics/tensorboard.py. A custom hook logs values without changes here (docs/hooks.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from components.data.loader import epochs
from components.gradient_noise import GradientNoise
from components.hardware import peak_memory_bytes
from components.interfaces import PackedDataset
from recipes.interfaces import ReportsMetrics
from recipes.step_results import LaunchedStep, StepResult


@dataclass(frozen=True)
class StepMetrics:
    """Makes the row of a step from its results."""

    model: nn.Module
    dataset: PackedDataset
    device: torch.device
    flops_per_token: float
    peak_flops: float | None
    """Peak FLOP/s of all devices of the run; None for an unknown device."""

    def row(
        self, launched: LaunchedStep, result: StepResult, noise: GradientNoise | None, *, step_seconds: float
    ) -> dict[str, Any]:
        """Return the row of a step; a value that was not measured is None."""
        progress, batch, sums = launched.progress, launched.batch, result.model_sums
        tokens_per_second = launched.tokens / step_seconds
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "samples": progress.samples,
            **epochs(self.dataset, progress.samples),
            "loss": result.loss,
            "lr": launched.lr,
            "grad_norm": result.grad_norm,
            "global_batch_size": batch.samples,
            "requested_batch_size": batch.requested,
            "micro_batches": batch.micro_batches,
            **launched.policy_metrics,
            **noise_metrics(noise),
            **({} if noise is None or noise.adam is None else noise_metrics(noise.adam, "_adam")),
            **(self.model.metrics_of(sums) if sums is not None and isinstance(self.model, ReportsMetrics) else {}),
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
            "data_seconds": launched.data_seconds,
            "mfu": tokens_per_second * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            "memory_bytes": peak_memory_bytes(self.device),
        }


def noise_metrics(noise: GradientNoise | None, suffix: str = "") -> dict[str, float | None]:
    """Return the metrics of the noise in one norm; None if it was not measured."""
    values = {
        "noise_scale": None if noise is None else noise.noise_scale,
        "noise_scale_over_batch": None if noise is None else noise.noise_scale_over_batch,
        "grad_cov_trace": None if noise is None else noise.moments.grad_cov_trace,
        "grad_sq_norm": None if noise is None else noise.moments.grad_sq_norm,
        "grad_cov_trace_ema": None if noise is None else noise.grad_cov_trace,
        "grad_sq_norm_ema": None if noise is None else noise.grad_sq_norm,
    }
    return {f"{name}{suffix}": value for name, value in values.items()}
