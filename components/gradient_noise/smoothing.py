"""[gradient_noise]: exponential averages (EMA) of the noise estimates of moments.py over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from components.errors import InputError
from components.gradient_noise.moments import GradientMoments, GradientNoise, Norm
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class GradientNoiseConfig:
    """[gradient_noise]: how often gradient noise is measured, with any batch policy, and how it is smoothed."""

    interval_steps: PositiveCount | None = 1
    """Steps between two measurements; "none": never measure."""
    smoothing_samples: PositiveCount = 1000
    """Samples after which the weight of a measurement has decayed to 1/e. Counted in samples, not steps, so that the
    smoothing window does not grow with the batch (AdaptDL)."""
    norms: tuple[Norm, ...] = ("l2",)
    """Norms of the gradients: "l2", the Euclidean one, which is always measured, and "adam", which weights each element
    as the update of AdamW does."""

    def __post_init__(self) -> None:
        if "l2" not in self.norms or len(set(self.norms)) < len(self.norms):
            raise InputError("norms", f'{list(self.norms)}: expected ["l2"] or ["l2", "adam"]')

    def build(self) -> NoiseEstimator:
        return NoiseEstimator(self.smoothing_samples)


@dataclass
class NoiseEstimator:
    """Exponential averages of S and |G|^2, separately: the average of a ratio of noisy terms would be biased."""

    smoothing_samples: int
    _grad_cov_trace: float = field(default=0.0, init=False)
    _grad_sq_norm: float = field(default=0.0, init=False)
    _weight: float = field(default=0.0, init=False)
    _samples: int = field(default=0, init=False)
    _adam: NoiseEstimator | None = field(default=None, init=False)
    """The averages in the norm of Adam, after its first measurement."""

    def update(self, samples: int, moments: Mapping[Norm, GradientMoments]) -> GradientNoise | None:
        """Add the moments of a step that ended after `samples` trained samples, and return the smoothed noise.

        Returns None, and changes nothing, for a step with a single micro-batch or with values that are not finite.
        """
        noise = self._update(samples, moments["l2"])
        if noise is None or "adam" not in moments:
            return noise
        self._adam = self._adam or NoiseEstimator(self.smoothing_samples)
        return replace(noise, adam=self._adam._update(samples, moments["adam"]))

    def _update(self, samples: int, moments: GradientMoments) -> GradientNoise | None:
        if moments.num_micro_batches < 2 or not (
            math.isfinite(moments.grad_cov_trace) and math.isfinite(moments.grad_sq_norm)
        ):
            return None
        kept = math.exp(-(samples - self._samples) / self.smoothing_samples)
        # The weight of a step is that of the samples it measured, without the unmeasured ones before it. Otherwise the
        # first measurement after a long pause would outweigh all others.
        weight = 1 - math.exp(-moments.samples / self.smoothing_samples)
        self._grad_cov_trace = kept * self._grad_cov_trace + weight * moments.grad_cov_trace
        self._grad_sq_norm = kept * self._grad_sq_norm + weight * moments.grad_sq_norm
        self._weight = kept * self._weight + weight
        self._samples = samples
        # dividing by the total weight removes the bias of the averages' start at zero
        return GradientNoise(moments, self._grad_cov_trace / self._weight, self._grad_sq_norm / self._weight)

    def state_dict(self) -> dict[str, Any]:
        return {
            "grad_cov_trace": self._grad_cov_trace,
            "grad_sq_norm": self._grad_sq_norm,
            "weight": self._weight,
            "samples": self._samples,
            "adam": self._adam and self._adam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._grad_cov_trace, self._grad_sq_norm = state["grad_cov_trace"], state["grad_sq_norm"]
        self._weight, self._samples = state["weight"], state["samples"]
        self._adam = None
        if (adam := state.get("adam")) is not None:
            self._adam = NoiseEstimator(self.smoothing_samples)
            self._adam.load_state_dict(adam)
