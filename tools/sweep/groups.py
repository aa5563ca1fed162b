"""Outcomes of a sweep in groups: runs that differ in the learning rate and the seed only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tools.sweep.grid import SEED, Job
from tools.sweep.optimum import NoOptimum, Optimum, find_optimum
from tools.sweep.outcome import Outcome


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
