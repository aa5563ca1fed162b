"""Outcomes in cells: all that is alike but for the rate and the seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from components.lr_schedules import SEQUENCE_OF_POWER
from tools.sweep.grid import Job
from tools.sweep.optimum import Optimum, Point, Unknown, optimum
from tools.sweep.runs import Outcome

SEED = "run.seed"
ALIKE = 1.01
"""Numbers within this factor are one: a warm-up in whole steps may end a little below its rate."""


@dataclass
class Cell:
    """One combination of all keys but the rate and the seed."""

    key: Mapping[str, str]
    outcomes: dict[float, list[Outcome]] = field(default_factory=dict)
    """By rate; one for each seed."""

    @property
    def losses(self) -> dict[float, list[float]]:
        """By rate, in order."""
        return {rate: [outcome.loss for outcome in each] for rate, each in sorted(self.outcomes.items())}

    @property
    def means(self) -> dict[float, float]:
        """Over seeds; infinite where one failed."""
        return {rate: sum(each) / len(each) for rate, each in self.losses.items()}

    @property
    def best(self) -> float:
        """The rate with the lowest mean loss."""
        return min(self.means, key=self.means.__getitem__)

    @property
    def optimum(self) -> Optimum | Unknown:
        return optimum(self.losses)

    @property
    def finished(self) -> list[Outcome]:
        return [outcome for each in self.outcomes.values() for outcome in each if outcome.failure is None]

    @property
    def tokens(self) -> int:
        return self.finished[0].tokens

    @property
    def beta(self) -> float:
        """The mean batch, in sequences of 4096 tokens."""
        return self.tokens / self.finished[0].steps / SEQUENCE_OF_POWER

    @property
    def applied(self) -> float | None:
        """The highest rate of its runs as a multiple of the one that is tuned; None where that is not one number."""
        factors = [out.peak_lr / rate for rate, each in self.outcomes.items() for out in each if out.failure is None]
        return factors[0] if max(factors) <= ALIKE * min(factors) else None

    def regret(self, rate: float, best: float | None = None) -> float:
        """How far above the `best` loss, that of its own best rate unless given, a rate ends; as a share of it."""
        reference = min(self.means.values()) if best is None else best
        return self.means.get(rate, math.inf) / reference - 1


def rate_of(job: Job, rate_key: str) -> float:
    """Raises ValueError where it is no number."""
    try:
        return float(job.varied[rate_key])
    except ValueError:
        raise ValueError(f"{rate_key} = {job.varied[rate_key]} is no number: it cannot be the rate") from None


def in_cells(done: Iterable[tuple[Job, Outcome]], rate_key: str) -> list[Cell]:
    """Those in which a run came to its end. Raises ValueError where a rate is no number."""
    cells: dict[tuple[tuple[str, str], ...], Cell] = {}
    for job, outcome in done:
        key = {name: value for name, value in job.varied.items() if name not in (rate_key, SEED)}
        cell = cells.setdefault(tuple(key.items()), Cell(key))
        cell.outcomes.setdefault(rate_of(job, rate_key), []).append(outcome)
    return [cell for cell in cells.values() if cell.finished]


def one_for_all(cells: Sequence[Cell]) -> tuple[float, float]:
    """The rate whose worst regret over the cells is the smallest, and that regret."""
    rates = sorted({rate for cell in cells for rate in cell.outcomes})
    worst = {rate: max(cell.regret(rate) for cell in cells) for rate in rates}
    chosen = min(worst, key=worst.__getitem__)
    return chosen, worst[chosen]


def points(cells: Sequence[Cell]) -> list[Point]:
    """Of the cells whose best rate lies inside the grid, as rates that were applied."""
    found = ((cell, cell.optimum, cell.applied) for cell in cells)
    return [
        Point(cell.tokens, cell.beta, best.rate * applied)
        for cell, best, applied in found
        if isinstance(best, Optimum) and applied
    ]
