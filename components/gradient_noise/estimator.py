"""What the gradients of the micro-batches of one step tell of the gradient's noise.

The gradient of K groups of m samples each, g_1 ... g_K with mean g, tells the trace of the covariance of one sample's
gradient, S = tr(Sigma), and the squared norm of the true gradient, |G|^2, without bias:

    S = m / (K - 1) * (sum_k |g_k|^2 - K |g|^2)        |G|^2 = |g|^2 - S / (K m)

(McCandlish et al., arXiv 1812.06162, appendix A).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from components.units import PositiveCount


@dataclass(frozen=True)
class GradientMoments:
    """What one step tells."""

    num_micro_batches: int
    """K: the micro-batches of all ranks."""
    micro_batch_size: int
    """m: samples in each."""
    sum_micro_grad_sq_norms: float
    """Sum over the groups of the squared norm of each group's mean gradient."""
    mean_grad_sq_norm: float
    """Squared norm of the mean gradient, before clipping."""

    @classmethod
    def of_step(
        cls, mean_grad_sq_norm: float, squares: float, *, groups: int, ranks: int, micro_batch_size: int
    ) -> GradientMoments:
        """From the two sums of `GradientMeter.sums`, of `groups` micro-batches on `ranks` data-parallel ranks.

        Each gradient came as its share of the mean over the micro-batches of its rank.
        """
        return cls(groups, micro_batch_size, squares * (groups / ranks) ** 2, mean_grad_sq_norm)

    @property
    def samples(self) -> int:
        """Global batch size."""
        return self.num_micro_batches * self.micro_batch_size

    @property
    def grad_cov_trace(self) -> float:
        """S: trace of the covariance of one sample's gradient. Needs two groups."""
        spread = self.sum_micro_grad_sq_norms - self.num_micro_batches * self.mean_grad_sq_norm
        return self.micro_batch_size / (self.num_micro_batches - 1) * spread

    @property
    def grad_sq_norm(self) -> float:
        """|G|^2: squared norm of the true gradient; being unbiased, the estimate of a small one may be negative."""
        return self.mean_grad_sq_norm - self.grad_cov_trace / self.samples


@dataclass(frozen=True)
class GradientNoise:
    """The moments of a step, and the estimates smoothed up to it."""

    moments: GradientMoments
    grad_cov_trace: float
    """S, smoothed."""
    grad_sq_norm: float
    """|G|^2, smoothed."""

    @property
    def num_micro_batches(self) -> int:
        return self.moments.num_micro_batches

    @property
    def micro_batch_size(self) -> int:
        return self.moments.micro_batch_size

    @property
    def sum_micro_grad_sq_norms(self) -> float:
        return self.moments.sum_micro_grad_sq_norms

    @property
    def mean_grad_sq_norm(self) -> float:
        return self.moments.mean_grad_sq_norm

    @property
    def noise_scale(self) -> float | None:
        """S / |G|^2, in samples: the batch whose noise is as large as its signal. None while the signal is lost."""
        return self.grad_cov_trace / self.grad_sq_norm if self.grad_sq_norm > 0 else None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> GradientNoise:
        return cls(GradientMoments(**state["moments"]), state["grad_cov_trace"], state["grad_sq_norm"])

    @property
    def noise_scale_over_batch(self) -> float | None:
        """The noise scale in batches. The norm test with eta passes while this is at most eta squared."""
        return None if self.noise_scale is None else self.noise_scale / self.moments.samples


@dataclass(frozen=True, kw_only=True)
class GradientNoiseConfig:
    """[gradient_noise]: how often gradient noise is measured, under any batch policy, and how it is smoothed."""

    interval_steps: PositiveCount | None = 1
    """Steps from one measurement to the next; "none": never."""
    smoothing_samples: PositiveCount = 1000
    """Samples after which a measurement has lost 63 % of its weight. Samples and not steps, so that the memory does not
    grow with the batch (AdaptDL)."""

    def build(self) -> NoiseEstimator:
        return NoiseEstimator(self.smoothing_samples)


@dataclass
class NoiseEstimator:
    """Exponential averages of noise and signal, each by itself: the mean of a ratio of noisy terms is biased."""

    smoothing_samples: int
    _noise: float = field(default=0.0, init=False)
    _signal: float = field(default=0.0, init=False)
    _weight: float = field(default=0.0, init=False)
    _samples: int = field(default=0, init=False)

    def update(self, samples: int, moments: GradientMoments) -> GradientNoise | None:
        """Take in what a step told that ended after `samples` samples in all.

        None where it tells nothing: it has one group only, or numbers that are not finite.
        """
        if moments.num_micro_batches < 2 or not (
            math.isfinite(moments.grad_cov_trace) and math.isfinite(moments.grad_sq_norm)
        ):
            return None
        kept = math.exp(-(samples - self._samples) / self.smoothing_samples)
        # A step counts for its own samples, not for those that passed unmeasured: after many of these, as when a run
        # begins to measure late, a single step would else decide all that follow.
        share = 1 - math.exp(-moments.samples / self.smoothing_samples)
        self._noise = kept * self._noise + share * moments.grad_cov_trace
        self._signal = kept * self._signal + share * moments.grad_sq_norm
        self._weight = kept * self._weight + share
        self._samples = samples
        return GradientNoise(moments, self._noise / self._weight, self._signal / self._weight)

    def state_dict(self) -> dict[str, Any]:
        return {"noise": self._noise, "signal": self._signal, "weight": self._weight, "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._noise, self._signal = state["noise"], state["signal"]
        self._weight, self._samples = state["weight"], state["samples"]
