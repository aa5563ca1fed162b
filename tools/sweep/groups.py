"""Outcomes of a sweep in groups: runs that differ in the learning rate and the seed only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from components.lr_schedules import POWER_LAW_SEQ_LEN
from tools.sweep.__main__ import SEED
from tools.sweep.grid import Job
from tools.sweep.lr_law import NoOptimum, Optimum, OptimumPoint, find_optimum
from tools.sweep.runner import Outcome

SAME_LR_FACTOR = 1.01
"""Learning rates within this factor are equal: a warm-up in whole steps may end a little below its peak."""


@dataclass
class Group:
    """One combination of all keys except the learning rate and the seed."""

    key: Mapping[str, str]
    outcomes: dict[float, list[Outcome]] = field(default_factory=dict)
    """Learning rate -> one outcome for each seed."""

    @property
    def losses(self) -> dict[float, list[float]]:
        """Learning rate -> losses by seed, in order of the learning rates."""
        return {lr: [outcome.loss for outcome in each] for lr, each in sorted(self.outcomes.items())}

    @property
    def means(self) -> dict[float, float]:
        """Learning rate -> mean loss over seeds; infinite where one failed."""
        return {lr: sum(each) / len(each) for lr, each in self.losses.items()}

    @property
    def best(self) -> float:
        """The learning rate with the lowest mean loss."""
        return min(self.means, key=self.means.__getitem__)

    @property
    def optimum(self) -> Optimum | NoOptimum:
        return find_optimum(self.losses)

    @property
    def finished(self) -> list[Outcome]:
        return [outcome for each in self.outcomes.values() for outcome in each if outcome.failure is None]

    @property
    def tokens(self) -> int:
        return self.finished[0].tokens

    @property
    def beta(self) -> float:
        """The mean batch, in sequences of 4096 tokens."""
        return self.tokens / self.finished[0].steps / POWER_LAW_SEQ_LEN

    @property
    def peak_lr_factor(self) -> float | None:
        """The peak learning rate of the runs over the one that is tuned; None if that is not one number."""
        factors = [run.peak_lr / lr for lr, each in self.outcomes.items() for run in each if run.failure is None]
        return factors[0] if max(factors) <= SAME_LR_FACTOR * min(factors) else None

    def regret(self, lr: float, best: float | None = None) -> float:
        """Return how far the loss at `lr` is above the `best` (by default of this group), as a fraction of it."""
        reference = min(self.means.values()) if best is None else best
        return self.means.get(lr, math.inf) / reference - 1


def lr_of(job: Job, lr_key: str) -> float:
    """Return the learning rate of a run. Raises ValueError if it is not a number."""
    try:
        return float(job.varied[lr_key])
    except ValueError:
        raise ValueError(f"{lr_key} = {job.varied[lr_key]} is not a number, so it is not a learning rate") from None


def group_results(done: Iterable[tuple[Job, Outcome]], lr_key: str) -> list[Group]:
    """Return the groups in which a run finished. Raises ValueError if a learning rate is not a number."""
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for job, outcome in done:
        key = {name: value for name, value in job.varied.items() if name not in (lr_key, SEED)}
        group = groups.setdefault(tuple(key.items()), Group(key))
        group.outcomes.setdefault(lr_of(job, lr_key), []).append(outcome)
    return [group for group in groups.values() if group.finished]


def minimax_lr(groups: Sequence[Group]) -> tuple[float, float]:
    """Return the learning rate whose worst regret over the groups is the smallest, and that regret."""
    lrs = sorted({lr for group in groups for lr in group.outcomes})
    worst = {lr: max(group.regret(lr) for group in groups) for lr in lrs}
    chosen = min(worst, key=worst.__getitem__)
    return chosen, worst[chosen]


def optimum_points(groups: Sequence[Group]) -> list[OptimumPoint]:
    """Return the optima that lie inside the grid, as peak learning rates."""
    found = ((group, group.optimum, group.peak_lr_factor) for group in groups)
    return [
        OptimumPoint(group.tokens, group.beta, best.lr * factor)
        for group, best, factor in found
        if isinstance(best, Optimum) and factor
    ]
