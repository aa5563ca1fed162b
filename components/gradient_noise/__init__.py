"""Gradient noise: how much the gradients of the micro-batches of one step differ from one another.

norms.py      squared norms of sharded gradients
hooks.py      collects the squared norms of the micro-batch gradients during backward
moments.py    the estimates of one step: tr(Sigma), |G|^2 and the noise scale
smoothing.py  [gradient_noise]: how often to measure, and exponential averages over steps
"""

from components.gradient_noise.hooks import GradientNoiseHooks, backward_parameters, named_backward_parameters
from components.gradient_noise.moments import GradientMoments, GradientNoise
from components.gradient_noise.smoothing import GradientNoiseConfig, NoiseEstimator

__all__ = [
    "GradientMoments",
    "GradientNoise",
    "GradientNoiseConfig",
    "GradientNoiseHooks",
    "NoiseEstimator",
    "backward_parameters",
    "named_backward_parameters",
]
