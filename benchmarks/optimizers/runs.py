"""The runs of the comparison, and the search for the best learning rate of each setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.lr_transfer.methods import MUP
from benchmarks.text_runs import SIZES, WARMUP, text_run
from tools.sweep.grid import Job, Settings
from tools.sweep.outcome import Outcome
from tools.sweep.runner import Results

MUON = {"optimizer.use": "components.optimizers:Muon"}
OPTIMIZERS: dict[str, Settings] = {
    "AdamW": {},
    "Muon": MUON,
    "NorMuon": {**MUON, "optimizer.variant": "normuon"},
    "AdamW, bf16 momentum": {"optimizer.state_dtype": "bf16"},
    "AdamW, muP": MUP,
    "Muon, muP": {**MUON, **MUP},
}
FIRST_LR = {8: 2e-3, 32: 4e-3, 128: 5.7e-3}
"""The lowest of the first four learning rates, by batch; other batches: 4e-3."""
SHORTER = (0.5, 0.7)
"""Fractions of the tokens at which the variants of Muon are also trained."""
BASELINES = {"Muon": "AdamW", "NorMuon": "AdamW", "Muon, muP": "AdamW, muP"}
"""Variant of Muon -> what it is compared with."""


class Setting(NamedTuple):
    """What is tuned by itself."""

    size: str
    batch: int
    """In samples."""
    optimizer: str


@dataclass(frozen=True)
class Tuning:
    """The learning rates tried so far."""

    results: Results
    text: Mapping[str, Path]
    tokens: int
    seeds: int

    def job(self, setting: Setting, lr: float, seed: int = 0, fraction: float = 1.0) -> Job:
        """Return the run of a setting at one learning rate."""
        tokens = round(self.tokens * fraction)
        varied = {
            **SIZES[setting.size],
            **OPTIMIZERS[setting.optimizer],
            "batch.initial_size": str(setting.batch),
            "training.total_tokens": str(tokens),
            "lr_schedule.warmup_tokens": str(round(WARMUP * tokens)),
            "lr_schedule.max_lr": f"{lr:.3g}",
            "run.seed": str(seed),
        }
        return text_run(varied, self.text)

    def losses(self, setting: Setting) -> dict[float, float]:
        """Return learning rate -> validation loss of the first seed, for those tried, in ascending order."""
        found = {}
        for lr in _learning_rates(setting):
            if (outcome := self.results.get(self.job(setting, lr))) is not None:
                found[lr] = outcome.loss
        return found

    def best_lr(self, setting: Setting) -> float | None:
        """Return the best learning rate if those on both sides of it are worse and four were tried, else None."""
        losses = self.losses(setting)
        tried = list(losses)
        if len(tried) < 4:
            return None
        best = min(tried, key=losses.__getitem__)
        return None if best in (tried[0], tried[-1]) else best

    def outcomes(self, setting: Setting, fraction: float = 1.0) -> list[Outcome]:
        """Return the outcomes of all seeds at the best learning rate."""
        lr = self.best_lr(setting)
        if lr is None:
            return []
        jobs = [self.job(setting, lr, seed, fraction) for seed in range(self.seeds)]
        return [outcome for job in jobs if (outcome := self.results.get(job)) is not None]

    def wanted(self, setting: Setting) -> Iterator[Job]:
        """Yield the next runs: learning rates until the best is between two others, then seeds and shorter runs."""
        lr, losses = self.best_lr(setting), self.losses(setting)
        if lr is None:
            grid = _learning_rates(setting)
            lrs = grid[_START : _START + 4]
            if set(lrs) <= losses.keys():
                best = min(losses, key=losses.__getitem__)
                tried = [grid.index(each) for each in losses]
                lrs = [grid[tried[0] - 1] if best == min(losses) else grid[tried[-1] + 1]]
            yield from (self.job(setting, each) for each in lrs)
        else:
            for fraction in (1.0, *(SHORTER if setting.optimizer in BASELINES else ())):
                yield from (self.job(setting, lr, seed, fraction) for seed in range(self.seeds))


_START = 8
"""Position of FIRST_LR in a grid."""


def _learning_rates(setting: Setting) -> list[float]:
    first = FIRST_LR.get(setting.batch, 4e-3)
    return [float(f"{first * math.sqrt(2) ** power:.3g}") for power in range(-_START, 13)]


def next_jobs(tuning: Tuning, settings: Sequence[Setting]) -> list[Job]:
    """Return the runs without an outcome that can be started now; none when all settings are complete."""
    jobs = [job for setting in settings for job in tuning.wanted(setting)]
    return [job for job in jobs if tuning.results.get(job) is None]
