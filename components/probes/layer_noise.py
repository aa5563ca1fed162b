"""The gradient noise of every layer, from the gradients of the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from components.gradient_noise.moments import GradientMoments
from components.gradient_noise.norms import SquaredNorm
from components.probes.groups import group_of
from components.probes.probed_step import ProbedStep
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """The gradient noise of each layer: trace of the covariance of one sample's gradient, squared norm of the true
    gradient, and their ratio, the noise scale in samples. The estimates are those of the step alone, not smoothed.
    Measured at steps at which [gradient_noise] measures."""

    interval_steps: PositiveCount = 100
    """Steps between two measurements; a multiple of gradient_noise.interval_steps. The first step is measured."""
    by_module: bool = False
    """Report the modules of a layer, such as attention and feed_forward, instead of the whole layer."""

    def on_micro_gradient(self, step: ProbedStep, name: str, gradient: Tensor) -> None:
        group = group_of(name, by_module=self.by_module)
        squares: SquaredNorm = step.scratch.setdefault(group, SquaredNorm(step.device))
        squares.add(gradient)
        squares.flush()  # a gradient that waits for others cannot be freed

    def on_gradients(self, step: ProbedStep) -> None:
        for group, squares in step.scratch.items():
            step.record_sum(f"micro_squares_{group}", squares.total())
        for name, parameter in step.parameters.items():
            group = group_of(name, by_module=self.by_module)
            if parameter.grad is not None and group in step.scratch:
                step.record_norm(f"norm_{group}", parameter.grad)
        step.scratch.clear()

    def finish(self, step: ProbedStep, values: Mapping[str, Any]) -> Mapping[str, float]:
        found = {}
        for name, micro_squares in values.items():
            if not name.startswith("micro_squares_"):
                continue
            group = name.removeprefix("micro_squares_")
            moments = GradientMoments.from_sums(
                values[f"norm_{group}"] ** 2,
                micro_squares,
                num_micro_batches=step.micro_batches,
                micro_batch_size=step.micro_batch_size,
            )
            found[f"grad_cov_trace_{group}"] = moments.grad_cov_trace
            found[f"grad_sq_norm_{group}"] = moments.grad_sq_norm
            if moments.grad_sq_norm > 0:
                found[f"noise_scale_{group}"] = moments.grad_cov_trace / moments.grad_sq_norm
        return found
