"""Batch policies: how many samples each optimizer step takes.

policy.py         the interface of policies, with defaults
adaptive_base.py  base class of the policies that follow the gradient noise: bounds, pace, state
norm_test.py      NormTest: relative error of the mean gradient at most eta
noise_scale.py    NoiseScale: proportional to the noise scale
goodput.py        Goodput: the most progress per second
step_times.py     the time of a step against its number of micro-batches, for Goodput
seesaw.py         Seesaw: grows where the schedule would lower the learning rate
ramp.py           Ramp: stages at given tokens
constant.py       Constant
rounding.py       rounds a requested size up to whole micro-batches on every rank

The gradient noise is measured and smoothed in components/gradient_noise/. recipes/batch_policy.py builds the policy.
"""

from components.batch.adaptive_base import Adaptive, AdaptivePolicy
from components.batch.constant import Constant
from components.batch.goodput import Goodput
from components.batch.noise_scale import NoiseScale
from components.batch.norm_test import NormTest
from components.batch.policy import BatchPolicy, Progress, StepTime, complete_policy
from components.batch.ramp import Ramp, Stage
from components.batch.rounding import BatchRounding, StepBatch
from components.batch.seesaw import Seesaw
from components.gradient_noise.moments import GradientNoise

__all__ = [
    "Adaptive",
    "AdaptivePolicy",
    "BatchPolicy",
    "BatchRounding",
    "Constant",
    "Goodput",
    "GradientNoise",
    "NoiseScale",
    "NormTest",
    "Progress",
    "Ramp",
    "Seesaw",
    "Stage",
    "StepBatch",
    "StepTime",
    "complete_policy",
]
