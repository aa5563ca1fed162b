"""Gradient noise: how much the gradients of the micro-batches of one step differ from one another.

norms.py      squared norms of sharded gradients
adam_norm.py  the norm in the geometry of Adam
hooks.py      collects the squared norms of the micro-batch gradients during backward
moments.py    the estimates of one step: tr(Sigma), |G|^2 and the noise scale
smoothing.py  [gradient_noise]: how often to measure, and exponential averages over steps
"""

from components.gradient_noise.adam_norm import AdamNorm, require_preconditioner
from components.gradient_noise.hooks import GradientNoiseHooks, named_backward_parameters
from components.gradient_noise.moments import GradientMoments, GradientNoise
from components.gradient_noise.smoothing import GradientNoiseConfig, NoiseEstimator

__all__ = [
    "AdamNorm",
    "GradientMoments",
    "GradientNoise",
    "GradientNoiseConfig",
    "GradientNoiseHooks",
    "NoiseEstimator",
    "named_backward_parameters",
    "require_preconditioner",
]
