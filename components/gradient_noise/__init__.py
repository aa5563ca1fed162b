"""Gradient noise: how much the gradients of the micro-batches of one step differ from one another."""

from components.gradient_noise.estimator import GradientMoments, GradientNoise, GradientNoiseConfig, NoiseEstimator
from components.gradient_noise.hooks import GradientNoiseHooks, backward_parameters

__all__ = [
    "GradientMoments",
    "GradientNoise",
    "GradientNoiseConfig",
    "GradientNoiseHooks",
    "NoiseEstimator",
    "backward_parameters",
]
