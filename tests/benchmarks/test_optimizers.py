"""The search of a learning rate, and the fraction of AdamW's steps, on results that are made up."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from benchmarks.optimizers.report import fraction_to, report_lines
from benchmarks.optimizers.runs import Setting, Tuning, next_jobs

pytestmark = pytest.mark.quick

ADAMW, MUON = Setting("1M", 32, "AdamW"), Setting("1M", 32, "Muon")


class MadeUp(Tuning):
    """A loss that is lowest at one learning rate, and falls with the fraction of the tokens."""

    def __init__(self, best: dict[str, float], offset: dict[str, float]) -> None:
        super().__init__(SimpleNamespace(get=lambda job: self.done.get(job)), {}, 1000, 2)
        object.__setattr__(self, "best", best)
        object.__setattr__(self, "offset", offset)
        object.__setattr__(self, "done", {})

    def job(self, setting, lr, seed=0, fraction=1.0):
        return (setting, lr, seed, fraction)

    def run(self, settings: list[Setting]) -> int:
        """Run all jobs that can be started; return their number."""
        jobs = next_jobs(self, settings)
        for setting, lr, seed, fraction in jobs:
            loss = 4 + self.offset[setting.optimizer] + math.log2(lr / self.best[setting.optimizer]) ** 2 - fraction
            self.done[setting, lr, seed, fraction] = SimpleNamespace(loss=loss + 0.001 * seed, seconds=2.0, steps=10)
        return len(jobs)


def test_the_learning_rate_is_searched_until_the_best_is_between_two_others():
    tuning = MadeUp({"AdamW": 0.064, "Muon": 4e-3}, {"AdamW": 0.0, "Muon": 0.0})
    rounds = [tuning.run([ADAMW])]
    while rounds[-1]:
        rounds.append(tuning.run([ADAMW]))
    assert rounds[0] == 4 and set(rounds[1:-2]) == {1}, "four learning rates, then one at a time"
    assert rounds[-2] == 1, "the other seed of the best one"
    assert tuning.best_lr(ADAMW) == pytest.approx(0.064, rel=0.02)


def test_the_fraction_of_steps_is_interpolated_between_whole_runs():
    # AdamW ends at 4 - 1 + 0; Muon, 0.2 lower, reaches that at 80 % of the tokens
    tuning = MadeUp({"AdamW": 5.66e-3, "Muon": 5.66e-3}, {"AdamW": 0.0, "Muon": -0.2})
    while tuning.run([ADAMW, MUON]):
        pass
    assert len(tuning.outcomes(MUON, 0.5)) == 2 and not tuning.outcomes(ADAMW, 0.5)
    loss = sum(each.loss for each in tuning.outcomes(ADAMW)) / 2
    assert fraction_to(tuning, MUON, loss) == "80%"
    assert fraction_to(tuning, MUON, 9.0) == "less than 50%"
    assert fraction_to(tuning, MUON, 1.0) == "more than 100 %"
    table = list(report_lines(tuning, [ADAMW, MUON]))
    assert "| 1M | 32 | AdamW | 0.00566 | 3.0005 ± 0.0007 (2) | +0.0% | 100 % | 200 |" in table
    assert "| 1M | 32 | Muon | 0.00566 | 2.8005 ± 0.0007 (2) | -6.7% | 80% | 200 |" in table
