"""Gradient moments: how much the gradients of the micro-batches of one step differ from one another."""

from components.gradient_moments.meter import GradientMeter, backward_parameters
from components.gradient_moments.moments import GradientMoments, GradientNoise, MeasureMoments, SmoothedNoise

__all__ = [
    "GradientMeter",
    "GradientMoments",
    "GradientNoise",
    "MeasureMoments",
    "SmoothedNoise",
    "backward_parameters",
]
