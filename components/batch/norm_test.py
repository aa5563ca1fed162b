"""The norm test: a batch large enough that its mean gradient is within eta of the true one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from components.batch.adaptive import Adaptive
from components.batch.policy import GradientNoise
from components.errors import InputError
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class NormTest(Adaptive):
    """Grows the batch until the error of its mean gradient g is below eta times its length (arXiv 2412.21124).

    For b independent samples whose gradients have the covariance Sigma, E ||g - G||^2 = tr(Sigma) / b, so the test
    ||g - G|| <= eta ||G|| holds, in the mean, from b = tr(Sigma) / (eta^2 ||G||^2) on.
    """

    eta: Annotated[float, Field(gt=0)]
    """Error of the mean gradient that is put up with, relative to its length. Smaller: larger batches; 1: the noise
    scale. Above 1 is legitimate: most of the step is then noise, which later steps average out."""
    estimator: Literal["unbiased", "paper"] = "unbiased"
    """Either tr(Sigma) and ||G||^2 without bias, smoothed over steps, or equation 5 of the paper as printed, from each
    step alone: the target is then at most (J - 1) / eta^2 for J workers, and the batch never shrinks. The paper rounds
    up to workers times accumulation steps; `quantum` is what is rounded up to here."""
    workers: PositiveCount | None = None
    """J of the paper's estimator; unset: the groups measured, which are micro-batches. Any other number: what equation
    5 is expected to give for so many workers, from the groups measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers is not None and self.estimator == "unbiased":
            raise InputError(
                "workers", 'the unbiased estimate does not depend on it; leave it out, or take estimator = "paper"'
            )
        if self.workers == 1:
            raise InputError("workers", "one has no spread, so the batch would never grow; give 2 or more")
        if self.shrink and self.estimator == "paper":
            raise InputError("shrink", 'the test of the paper only grows the batch; take estimator = "unbiased"')

    def target(self, noise: GradientNoise) -> float | None:
        return self._paper(noise) if self.estimator == "paper" else self._unbiased(noise)

    def _unbiased(self, noise: GradientNoise) -> float | None:
        tolerated = self.eta * self.eta * noise.grad_sq_norm
        # An unbiased estimate of a small number may well be negative. No batch follows from that, and none is needed:
        # smoothing brings the estimate back while the signal lasts.
        return noise.grad_cov_trace / tolerated if tolerated > 0 else None

    def _paper(self, noise: GradientNoise) -> float | None:
        """T of equation 5: (1/J) sum_j ||g_j - g||^2 / (eta^2 ||g||^2), for the J = K groups measured.

        For J other workers: with S = m/(K - 1) sum_k ||g_k - g||^2 from K groups of m samples, the mean over J groups
        of the same b = K m samples is expected to be S (J - 1) / b.
        """
        groups = noise.num_micro_batches
        tolerated = self.eta * self.eta * noise.mean_grad_sq_norm
        if groups < 2 or tolerated <= 0:
            return None
        spread = max(
            0.0, noise.sum_micro_grad_sq_norms - groups * noise.mean_grad_sq_norm
        )  # of equal groups: zero, but for rounding
        workers = groups if self.workers is None else self.workers
        return spread / groups * ((workers - 1) / (groups - 1)) / tolerated
