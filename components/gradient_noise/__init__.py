"""Gradient moments: how much the gradients of the micro-batches of one step differ from one another."""

from components.gradient_noise.estimator import GradientMoments, GradientNoise, MeasureMoments, SmoothedNoise
from components.gradient_noise.hooks import GradientMeter, backward_parameters

__all__ = [
    "GradientMeter",
    "GradientMoments",
    "GradientNoise",
    "MeasureMoments",
    "SmoothedNoise",
    "backward_parameters",
]
