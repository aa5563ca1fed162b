"""What metrics.jsonl says of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from components.data.loader import epochs
from components.gradient_moments import GradientNoise
from components.throughput import memory_bytes
from recipes.contracts import ReportsMetrics
from recipes.launched_step import LaunchedStep, StepResult

if TYPE_CHECKING:
    from recipes.pretrain import TrainingRun


def step_row(
    run: TrainingRun, launched: LaunchedStep, result: StepResult, noise: GradientNoise | None, *, step_seconds: float
) -> dict[str, Any]:
    """Of a step that was read."""
    progress, batch, sums = launched.progress, launched.batch, result.model_sums
    tokens_per_second = batch.samples * run.sequence_length / step_seconds
    peak = run.peak_flops
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "samples": progress.samples,
        **epochs(run.samples, progress.samples),
        "loss": result.loss,
        "lr": launched.lr,
        "grad_norm": result.grad_norm,
        "global_batch_size": batch.samples,
        "requested_batch_size": batch.requested,
        "micro_batches": batch.micro_batches,
        "noise_scale": noise and noise.noise_scale,
        "norm_test": noise and noise.norm_test,
        "gradient_noise": noise and noise.moments.noise,
        "gradient_signal": noise and noise.moments.signal,
        "gradient_noise_smoothed": noise and noise.noise,
        "gradient_signal_smoothed": noise and noise.signal,
        **(run.model.metrics_of(sums) if sums is not None and isinstance(run.model, ReportsMetrics) else {}),
        "tokens_per_second": tokens_per_second,
        "step_seconds": step_seconds,
        "data_seconds": launched.data_seconds,
        "mfu": tokens_per_second * run.flops_per_token / (peak * run.world.size) if peak else None,
        "memory_bytes": memory_bytes(run.world.device),
    }
