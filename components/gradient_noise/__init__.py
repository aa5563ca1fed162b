"""Gradient moments: how much the gradients of the micro-batches of one step differ from one another."""

from components.gradient_noise.hooks import GradientNoiseHooks, backward_parameters
from components.gradient_noise.moments import GradientMoments, GradientNoise, GradientNoiseConfig, NoiseEstimator

__all__ = [
    "GradientMoments",
    "GradientNoise",
    "GradientNoiseConfig",
    "GradientNoiseHooks",
    "NoiseEstimator",
    "backward_parameters",
]
