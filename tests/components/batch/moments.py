"""Measured steps, made up: what a policy is told of the gradient."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from components.batch import BatchPolicy, complete_policy
from components.clock import TrainingClock
from components.lr_schedules import Constant
from recipes.interfaces import complete_schedule


@dataclass(frozen=True, kw_only=True)
class Moments:
    """A GradientNoise of plain numbers."""

    groups: int = 8
    group_samples: int = 1
    sum_of_squares: float = 9.0
    mean_square: float = 1.0
    noise: float = 1.0
    signal: float = 1.0


FLOATS = [field.name for field in fields(Moments) if field.type == "float"]


def wants(target: float, batch: int = 1) -> Moments:
    """A step of `batch` samples after which the noise scale is `target`."""
    return Moments(groups=batch, noise=target)


def of_gradients(groups: np.ndarray, group_samples: int) -> Moments:
    """Of the mean gradients (K, parameters) of K groups: the raw moments, and the estimates of this step alone."""
    count, mean = len(groups), groups.mean(axis=0)
    squares, mean_square = float((groups**2).sum()), float((mean**2).sum())
    noise = group_samples / (count - 1) * (squares - count * mean_square)
    signal = mean_square - noise / (count * group_samples)
    return Moments(
        groups=count,
        group_samples=group_samples,
        sum_of_squares=squares,
        mean_square=mean_square,
        noise=noise,
        signal=signal,
    )


def clock(samples: int = 0, total_tokens: int = 10**6, sequence_length: int = 1) -> TrainingClock:
    return TrainingClock(total_tokens=total_tokens, sequence_length=sequence_length, samples=samples)


def built(config: Any, schedule: Any = None, *, sequence_length: int = 1, total_tokens: int = 10**6) -> BatchPolicy:
    """The policy of one run, by default under a constant schedule."""
    schedule = complete_schedule(schedule or Constant(max_lr=1.0))
    return complete_policy(config.build(schedule=schedule, sequence_length=sequence_length, total_tokens=total_tokens))
