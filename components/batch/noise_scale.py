"""A batch proportional to the gradient noise scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from components.batch.adaptive import Adaptive
from components.batch.policy import GradientNoise


@dataclass(frozen=True, kw_only=True)
class NoiseScale(Adaptive):
    """`coefficient` times tr(Sigma) / ||G||^2, the simple noise scale (arXiv 1812.06162, equation 2.9).

    It is the unbiased norm test with coefficient = 1 / eta^2, said as a share of the noise scale.
    """

    coefficient: Annotated[float, Field(gt=0)] = 1.0
    """Batch size in units of the noise scale. At 1 half of what a step could gain is lost to noise."""

    def target(self, noise: GradientNoise) -> float | None:
        # An unbiased estimate of a small signal may be negative: no batch follows, and smoothing brings it back.
        return self.coefficient * noise.grad_cov_trace / noise.grad_sq_norm if noise.grad_sq_norm > 0 else None
