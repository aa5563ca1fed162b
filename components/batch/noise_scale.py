"""A batch proportional to the gradient noise scale.

The noise is measured and smoothed in components/gradient_noise/; this only chooses the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from components.batch.adaptive_base import Adaptive
from components.gradient_noise.moments import GradientNoise


@dataclass(frozen=True, kw_only=True)
class NoiseScale(Adaptive):
    """`coefficient` times tr(Sigma) / ||G||^2, the simple noise scale (arXiv 1812.06162, equation 2.9).

    Equal to the unbiased norm test with coefficient = 1 / eta^2.
    """

    coefficient: Annotated[float, Field(gt=0)] = 1.0
    """Batch size in units of the noise scale. At 1, noise costs half of the progress that a step could make."""

    def target(self, noise: GradientNoise) -> float | None:
        # an unbiased estimate of a small ||G||^2 may be negative: keep the size until smoothing makes it positive
        return self.coefficient * noise.grad_cov_trace / noise.grad_sq_norm if noise.grad_sq_norm > 0 else None
