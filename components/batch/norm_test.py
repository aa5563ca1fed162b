"""The norm test: grow the batch until the relative error of its mean gradient is at most eta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from components.batch.adaptive_base import Adaptive
from components.errors import InputError
from components.gradient_noise.moments import GradientMoments, GradientNoise
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class NormTest(Adaptive):
    """Grows the batch until the error of its mean gradient is at most eta times the gradient norm (arXiv 2412.21124).

    For the mean g of b independent gradients with mean G and covariance Sigma, E ||g - G||^2 = tr(Sigma) / b,
    so the test ||g - G|| <= eta ||G|| holds on average from b = tr(Sigma) / (eta^2 ||G||^2) on.
    """

    eta: Annotated[float, Field(gt=0)]
    """Tolerated relative error of the mean gradient. Smaller values give larger batches; 1 gives the noise scale.
    Values above 1 are valid: most of a step is then noise, which later steps average out."""
    estimator: Literal["unbiased", "paper"] = "unbiased"
    """unbiased: tr(Sigma) and ||G||^2 without bias, smoothed over steps. paper: equation 5 as printed, from each step
    alone; the target is then at most (J - 1) / eta^2 for J workers, and the batch never shrinks. The paper rounds up to
    workers times accumulation steps; here sizes are rounded up to `multiple_of`."""
    workers: PositiveCount | None = None
    """J of the paper's estimator; unset: the number of micro-batches K. For another number, the expectation of equation
    5 for that many workers is computed from the K micro-batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers is not None and self.estimator == "unbiased":
            raise InputError(
                "workers", 'the unbiased estimate does not depend on it; remove it, or use estimator = "paper"'
            )
        if self.workers == 1:
            raise InputError("workers", "1: must be 2 or more, because the variance of one worker is undefined")
        if self.shrink and self.estimator == "paper":
            raise InputError(
                "shrink", 'estimator = "paper" only grows the batch; use estimator = "unbiased", or remove shrink'
            )

    def target(self, noise: GradientNoise) -> float | None:
        return self._paper(noise.moments) if self.estimator == "paper" else self._unbiased(noise)

    def _unbiased(self, noise: GradientNoise) -> float | None:
        tolerated = self.eta * self.eta * noise.grad_sq_norm
        # an unbiased estimate of a small ||G||^2 may be negative: keep the size until smoothing makes it positive
        return noise.grad_cov_trace / tolerated if tolerated > 0 else None

    def _paper(self, moments: GradientMoments) -> float | None:
        """Return T of equation 5: (1/J) sum_j ||g_j - g||^2 / (eta^2 ||g||^2), for J = K micro-batches.

        For another J: S = m/(K - 1) sum_k ||g_k - g||^2 is estimated from K micro-batches of m samples, and the mean
        over J groups of the same b = K m samples is expected to be S (J - 1) / b.
        """
        num_micro_batches = moments.num_micro_batches  # K
        tolerated = self.eta * self.eta * moments.mean_grad_sq_norm
        if num_micro_batches < 2 or tolerated <= 0:
            return None
        # sum_k ||g_k - g||^2; rounding can make it slightly negative when all micro-batches are equal
        spread = max(0.0, moments.sum_micro_grad_sq_norms - num_micro_batches * moments.mean_grad_sq_norm)
        workers = num_micro_batches if self.workers is None else self.workers
        return spread / num_micro_batches * ((workers - 1) / (num_micro_batches - 1)) / tolerated
