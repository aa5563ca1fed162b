"""What metrics.jsonl says of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from components.batch.layout import StepBatch
from components.data.loader import epochs
from components.gradient_moments import GradientNoise
from components.throughput import memory_bytes
from recipes.contracts import HasStepNumbers

if TYPE_CHECKING:
    from recipes.pretrain import TrainingRun


def step_row(
    run: TrainingRun,
    batch: StepBatch,
    noise: GradientNoise | None,
    *,
    loss: float,
    lr: float,
    grad_norm: float,
    data_seconds: float,
    step_seconds: float,
) -> dict[str, Any]:
    """Of the step that `run` just ended. All processes call it together: a model may add up what each knows."""
    tokens_per_second = batch.samples * run.sequence_length / step_seconds
    peak = run.peak_flops
    return {
        "step": run.clock.step,
        "tokens": run.clock.tokens,
        "samples": run.clock.samples,
        **epochs(run.samples, run.clock.samples),
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "global_batch_size": batch.samples,
        "requested_batch_size": batch.requested,
        "micro_batches": batch.micro_batches,
        "noise_scale": noise and noise.noise_scale,
        "norm_test": noise and noise.norm_test,
        "gradient_noise": noise and noise.moments.noise,
        "gradient_signal": noise and noise.moments.signal,
        "gradient_noise_smoothed": noise and noise.noise,
        "gradient_signal_smoothed": noise and noise.signal,
        **(run.model.step_numbers(run.world.sum) if isinstance(run.model, HasStepNumbers) else {}),
        "tokens_per_second": tokens_per_second,
        "step_seconds": step_seconds,
        "data_seconds": data_seconds,
        "mfu": tokens_per_second * run.flops_per_token / (peak * run.world.size) if peak else None,
        "memory_bytes": memory_bytes(run.world.device),
    }
