"""Components of the comparison alone: a norm test that follows the schedule, and a learning rate that stops growing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from components.batch import GradientNoise, NormTest, Progress
from components.batch.adaptive_base import AdaptivePolicy
from components.batch.seesaw import Schedule
from components.lr_schedules import WSD
from components.units import PositiveCount


@dataclass(frozen=True, kw_only=True)
class FollowingNormTest(NormTest):
    """A norm test whose eta falls as the schedule does at its reference batch: eta lr / max_lr.

    Before the decay it is the norm test with `eta`; in the decay its target is (max_lr / lr)^2 times as large.
    """

    def build(self, *, schedule: Schedule, sequence_length: int, total_tokens: int) -> FollowingPolicy:
        return FollowingPolicy(self, schedule)


class FollowingPolicy(AdaptivePolicy):
    """The policy of a `FollowingNormTest`."""

    def __init__(self, config: FollowingNormTest, schedule: Schedule) -> None:
        super().__init__(config)
        self._following, self._schedule, self._ratio = config, schedule, 1.0

    def observe(self, progress: Progress, noise: GradientNoise | None) -> None:
        assert self._schedule.max_lr is not None
        assert self._schedule.reference_batch_tokens is not None
        lr = self._schedule.lr(progress.tokens, self._schedule.reference_batch_tokens, progress.total_tokens)
        self._ratio = lr / self._schedule.max_lr
        super().observe(progress, noise)

    def target(self, noise: GradientNoise) -> float | None:
        eta = self._following.eta * self._ratio
        return replace(self._following, eta=eta).target(noise) if eta > 0 else None


@dataclass(frozen=True, kw_only=True)
class LimitedWSD(WSD):
    """WSD whose learning rate scales with the batch up to `scaled_up_to_tokens`, and not above it."""

    scaled_up_to_tokens: PositiveCount

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float:
        return super().lr(tokens, min(batch_tokens, self.scaled_up_to_tokens), total_tokens)
