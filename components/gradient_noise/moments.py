"""Estimates of the gradient noise from the gradients of the micro-batches of one step.

From the mean gradients g_1 ... g_K of K micro-batches of m samples each, with mean g, follow unbiased estimates of S =
tr(Sigma), the trace of the covariance of one sample's gradient, and |G|^2, the squared norm of the true gradient:

    S = m / (K - 1) * (sum_k |g_k|^2 - K |g|^2)        |G|^2 = |g|^2 - S / (K m)

(McCandlish et al., arXiv 1812.06162, appendix A). smoothing.py averages them over steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Norm = Literal["l2", "adam"]
"""The norms of gradients in which their noise is measured: the Euclidean one, and that of adam_norm.py."""


@dataclass(frozen=True)
class GradientMoments:
    """The squared gradient norms measured in one step, and the estimates from this step alone."""

    num_micro_batches: int
    """K: number of micro-batches of all ranks."""
    micro_batch_size: int
    """m: samples in each micro-batch."""
    sum_micro_grad_sq_norms: float
    """sum_k |g_k|^2: sum over micro-batches of the squared norm of each one's mean gradient."""
    mean_grad_sq_norm: float
    """|g|^2: squared norm of the mean gradient, before clipping."""

    @classmethod
    def from_sums(
        cls,
        mean_grad_sq_norm: float,
        micro_sq_norms: float,
        *,
        num_micro_batches: int,
        micro_batch_size: int,
    ) -> GradientMoments:
        """Return the moments from the two sums of `GradientNoiseHooks.sums`, added over all processes.

        The hooks saw each gradient divided by the number of micro-batches; that factor is removed here.
        """
        sum_micro_grad_sq_norms = micro_sq_norms * num_micro_batches**2
        return cls(num_micro_batches, micro_batch_size, sum_micro_grad_sq_norms, mean_grad_sq_norm)

    @property
    def samples(self) -> int:
        """K m: global batch size, in samples."""
        return self.num_micro_batches * self.micro_batch_size

    @property
    def grad_cov_trace(self) -> float:
        """S: trace of the covariance of one sample's gradient. Needs K >= 2."""
        spread = self.sum_micro_grad_sq_norms - self.num_micro_batches * self.mean_grad_sq_norm
        return self.micro_batch_size / (self.num_micro_batches - 1) * spread

    @property
    def grad_sq_norm(self) -> float:
        """|G|^2: squared norm of the true gradient; being unbiased, the estimate of a small value may be negative."""
        return self.mean_grad_sq_norm - self.grad_cov_trace / self.samples


@dataclass(frozen=True)
class GradientNoise:
    """The moments of one step, and the estimates smoothed over the steps up to it."""

    moments: GradientMoments
    grad_cov_trace: float
    """S, smoothed."""
    grad_sq_norm: float
    """|G|^2, smoothed."""
    adam: GradientNoise | None = None
    """The same in the norm of Adam; None if it was not measured."""

    def in_norm(self, norm: Norm) -> GradientNoise | None:
        """Return the noise in a norm; None if it was not measured."""
        return self if norm == "l2" else self.adam

    @property
    def noise_scale(self) -> float | None:
        """S / |G|^2, in samples: the batch size whose noise equals its signal. None where |G|^2 is not positive."""
        return self.grad_cov_trace / self.grad_sq_norm if self.grad_sq_norm > 0 else None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> GradientNoise:
        adam = state.get("adam")
        return cls(
            GradientMoments(**state["moments"]),
            state["grad_cov_trace"],
            state["grad_sq_norm"],
            adam and cls.from_state_dict(adam),
        )

    @property
    def noise_scale_over_batch(self) -> float | None:
        """Noise scale / global batch size. The norm test with eta passes while this is at most eta^2."""
        return None if self.noise_scale is None else self.noise_scale / self.moments.samples
