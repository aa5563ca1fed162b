"""Batch policies: how many samples each optimizer step takes."""

from components.batch.adaptive_base import Adaptive, AdaptivePolicy
from components.batch.constant import Constant
from components.batch.noise_scale import NoiseScale
from components.batch.norm_test import NormTest
from components.batch.policy import BatchPolicy, GradientNoise, Progress, complete_policy
from components.batch.ramp import Ramp, Stage
from components.batch.rounding import BatchRounding, StepBatch
from components.batch.seesaw import Seesaw

__all__ = [
    "Adaptive",
    "AdaptivePolicy",
    "BatchPolicy",
    "BatchRounding",
    "Constant",
    "GradientNoise",
    "NoiseScale",
    "NormTest",
    "Progress",
    "Ramp",
    "Seesaw",
    "Stage",
    "StepBatch",
    "complete_policy",
]
