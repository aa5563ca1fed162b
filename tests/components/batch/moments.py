"""Made-up measurements of the gradient noise, as policies receive them."""

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

    num_micro_batches: int = 8
    micro_batch_size: int = 1
    sum_micro_grad_sq_norms: float = 9.0
    mean_grad_sq_norm: float = 1.0
    grad_cov_trace: float = 1.0
    grad_sq_norm: float = 1.0
    adam: Moments | None = None

    @property
    def moments(self) -> Moments:
        return self

    @property
    def samples(self) -> int:
        return self.num_micro_batches * self.micro_batch_size

    def in_norm(self, norm: str) -> Moments | None:
        return self if norm == "l2" else self.adam


FLOATS = [field.name for field in fields(Moments) if field.type == "float"]


def wants(target: float, batch: int = 1) -> Moments:
    """A step of `batch` samples after which the noise scale is `target`."""
    return Moments(num_micro_batches=batch, grad_cov_trace=target)


def of_gradients(groups: np.ndarray, micro_batch_size: int) -> Moments:
    """Return the moments of K mean gradients (K, parameters), with the estimates of this step alone."""
    count, mean = len(groups), groups.mean(axis=0)
    squares, mean_grad_sq_norm = float((groups**2).sum()), float((mean**2).sum())
    noise = micro_batch_size / (count - 1) * (squares - count * mean_grad_sq_norm)
    signal = mean_grad_sq_norm - noise / (count * micro_batch_size)
    return Moments(
        num_micro_batches=count,
        micro_batch_size=micro_batch_size,
        sum_micro_grad_sq_norms=squares,
        mean_grad_sq_norm=mean_grad_sq_norm,
        grad_cov_trace=noise,
        grad_sq_norm=signal,
    )


def clock(samples: int = 0, total_tokens: int = 10**6, sequence_length: int = 1) -> TrainingClock:
    return TrainingClock(total_tokens=total_tokens, sequence_length=sequence_length, samples=samples)


def built(config: Any, schedule: Any = None, *, sequence_length: int = 1, total_tokens: int = 10**6) -> BatchPolicy:
    """The policy of one run, by default under a constant schedule."""
    schedule = complete_schedule(schedule or Constant(max_lr=1.0))
    return complete_policy(config.build(schedule=schedule, sequence_length=sequence_length, total_tokens=total_tokens))
