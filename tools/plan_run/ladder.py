"""The pilot runs of a plan: for each size and learning rate one stable phase, and decays that branch off from it.

A decay continues a checkpoint of the stable phase. It is bitwise equal to a whole run of its length
(tests/end_to_end/test_extend.py), and is recorded as that run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from components.lr_schedules import WSD, Power
from components.run_directory import RunDirectory
from recipes.config import Config
from tools.plan_run.family import Size
from tools.sweep.grid import Job, Settings, Sweep
from tools.sweep.groups import Group, group_results
from tools.sweep.outcome import Outcome
from tools.sweep.runner import Results, Runner

HORIZONS = (1, 2, 4)
"""Lengths of the stable phase before each decay, in checkpoints."""
DEFAULT_DECAY, MAX_DECAY = 0.1, 0.9
"""The fraction of decay where the recipe sets none, which is that of its schedule, and the largest one."""
MAX_EXTENSIONS = 3
"""Learning rates are added this often at either end while the best one is the last."""
NOISE_POINTS = 200
TOKENS, DECAY = "training.total_tokens", "lr_schedule.decay_tokens"


@dataclass(frozen=True)
class Pilots:
    """What the pilot runs have in common."""

    recipe: Path
    common: Settings
    """Keys of the command line."""
    config: Config
    """The recipe with these keys."""
    sizes: Sequence[Size]
    batch: int
    """Samples of every step, as many as the processes of a run can share: the checkpoints are counted in them."""
    tokens: int
    """Length of the longest decayed run; rounded to whole steps."""
    lrs: Sequence[float]
    """The learning rates, or amplitudes of Power, to try first."""
    seeds: int = 1
    processes: Callable[[object], int] = lambda recipe: 1

    def __post_init__(self) -> None:
        schedule = self.config.recipe.lr_schedule
        if not isinstance(schedule, WSD | Power):
            raise ValueError(
                f"lr_schedule.use: a plan needs WSD or Power, whose decays branch off, not {type(schedule).__name__}"
            )
        if self.decay_fraction > MAX_DECAY:
            raise ValueError(
                f"lr_schedule: {self.decay_fraction:.0%} of the recipe is decay; a plan needs a stable phase, so at "
                f"most {MAX_DECAY:.0%}"
            )

    @property
    def lr_key(self) -> str:
        """The key that is tuned."""
        return "lr_schedule.a" if isinstance(self.config.recipe.lr_schedule, Power) else "lr_schedule.max_lr"

    @property
    def decay_fraction(self) -> float:
        """The fraction of a run that is decay: that of the recipe."""
        recipe = self.config.recipe
        decay_tokens, fraction = recipe.lr_schedule.decay_tokens, recipe.lr_schedule.decay_fraction
        if decay_tokens is not None:
            fraction = decay_tokens / recipe.training.total_tokens
        return DEFAULT_DECAY if fraction in (None, 0) else float(fraction)

    @property
    def batch_tokens(self) -> int:
        return int(self.batch * self.config.recipe.training.sequence_length)

    @property
    def steps_between(self) -> int:
        """Steps of the stable phase between two checkpoints."""
        return max(1, round((1 - self.decay_fraction) * self.tokens / self.batch_tokens / HORIZONS[-1]))

    @property
    def warmup_tokens(self) -> int:
        """The warm-up of all runs: that of the recipe, at most a tenth of the shortest stable phase."""
        return min(self.config.recipe.lr_schedule.warmup_tokens, self.steps_between * self.batch_tokens // 10)

    def stable_tokens(self, horizon: int) -> int:
        return horizon * self.steps_between * self.batch_tokens

    def horizon_keys(self, horizon: int) -> dict[str, str]:
        """Return the keys of the run that decays after `horizon` checkpoints."""
        stable = self.stable_tokens(horizon)
        steps = round(stable / (1 - self.decay_fraction) / self.batch_tokens)
        return {TOKENS: str(steps * self.batch_tokens), DECAY: str(steps * self.batch_tokens - stable)}

    def jobs(self, size: Size, lr: float) -> tuple[list[Job], list[Job]]:
        """Return the stable phases of a size at one learning rate, one for each seed, and the decayed runs."""
        stable = {TOKENS: str(self.stable_tokens(HORIZONS[-1])), DECAY: "0"}
        jobs = self._sweep(size, lr, [stable, *(self.horizon_keys(horizon) for horizon in HORIZONS)]).jobs()
        return [job for job in jobs if job.varied[DECAY] == "0"], [job for job in jobs if job.varied[DECAY] != "0"]

    def _sweep(self, size: Size, lr: float, lengths: Sequence[Settings]) -> Sweep:
        replaced = ("batch.", "lr_schedule.decay_tokens")
        keys = {
            **{key: value for key, value in self.common.items() if not key.startswith(replaced)},
            "batch.use": "components.batch:Constant", "batch.initial_size": str(self.batch),
            "lr_schedule.warmup_tokens": str(self.warmup_tokens), "lr_schedule.decay_fraction": "none",
            "checkpoint.interval_steps": str(self.steps_between), "checkpoint.keep_last": "none",
        }  # fmt: skip
        if self.config.recipe.validation is not None:
            keys["validation.interval_steps"] = "none"
        if isinstance(self.config.recipe.lr_schedule, WSD):
            keys |= {"lr_schedule.batch_scaling": "none", "lr_schedule.reference_batch_tokens": "none"}
        seeds = [{"run.seed": str(self.config.recipe.run.seed + number)} for number in range(self.seeds)]
        varied = (*size.settings, TOKENS, DECAY, self.lr_key, "run.seed")
        keys = {key: value for key, value in keys.items() if key not in varied}
        rates = [{self.lr_key: f"{lr:g}"}]
        return Sweep(self.recipe, keys, [[size.settings], lengths, rates, seeds], self.processes)


@dataclass
class Ladder:
    """The pilot runs and their results."""

    pilots: Pilots
    results: Results

    def __post_init__(self) -> None:
        lrs = sorted({rounded(lr) for lr in self.pilots.lrs})
        self.lrs: dict[Size, list[float]] = {size: list(lrs) for size in self.pilots.sizes}
        self._extended: dict[tuple[Size, int], int] = {}
        self._jobs: dict[tuple[Size, float], tuple[list[Job], list[Job]]] = {}
        while self._extend():  # as far as the results go
            pass

    def missing(self) -> list[tuple[Size, Job]]:
        """Return the decayed runs without a result."""
        return [
            (size, job) for size in self.pilots.sizes for job in self._decayed(size) if self.results.get(job) is None
        ]

    def failed(self) -> list[tuple[Job, Outcome]]:
        """Return the decayed runs that failed."""
        found = ((job, self.results.get(job)) for size in self.pilots.sizes for job in self._decayed(size))
        return [(job, outcome) for job, outcome in found if outcome is not None and outcome.failure]

    def retry(self, at_a_time: int) -> int:
        """Run the decayed runs that failed again, as whole runs; return how many were killed."""
        return Runner(self.results, at_a_time).run([job for job, _ in self.failed()], again=True)

    def run(self, folder: Path, at_a_time: int) -> int:
        """Run what is missing; return how many runs were killed. Stable phases are kept in `folder` until used."""
        stable_runner = Runner(self.results, at_a_time, folder, curve_points=NOISE_POINTS)
        decay_runner = Runner(self.results, at_a_time)
        while missing := self.missing():
            sources = {job.digest: self._stable_job(size, job) for size, job in missing}
            needed = {job.digest: job for job in sources.values()}
            todo = [job for job in needed.values() if self.results.get(job) is None]
            if killed := stable_runner.run(todo):
                return killed
            decays = [
                replace(job, resume_from=self._checkpoint(folder, sources[job.digest], job)) for _, job in missing
            ]
            if killed := decay_runner.run(decays):
                return killed
            for job in needed.values():
                shutil.rmtree(folder / job.digest, ignore_errors=True)
            self._extend()
        return 0

    def groups(self, size: Size) -> list[Group]:
        """Return the results of a size, a group for each length in which a run finished."""
        done = [(job, outcome) for job in self._decayed(size) if (outcome := self.results.get(job)) is not None]
        return group_results(done, self.pilots.lr_key)

    def stable(self, size: Size) -> list[tuple[float, Outcome]]:
        """Return learning rate and outcome of the stable phases of a size."""
        return [
            (lr, outcome)
            for lr in self.lrs[size]
            for job in self._jobs_of(size, lr)[0]
            if (outcome := self.results.get(job)) is not None and outcome.failure is None
        ]

    def _jobs_of(self, size: Size, lr: float) -> tuple[list[Job], list[Job]]:
        if (size, lr) not in self._jobs:
            self._jobs[size, lr] = self.pilots.jobs(size, lr)
        return self._jobs[size, lr]

    def _decayed(self, size: Size) -> list[Job]:
        return [job for lr in self.lrs[size] for job in self._jobs_of(size, lr)[1]]

    def _stable_job(self, size: Size, decayed: Job) -> Job:
        """Return the stable phase that `decayed` branches off from."""
        found, _ = self._jobs_of(size, float(decayed.varied[self.pilots.lr_key]))
        return next(job for job in found if job.varied["run.seed"] == decayed.varied["run.seed"])

    def _checkpoint(self, folder: Path, stable: Job, decayed: Job) -> Path | None:
        """Return the checkpoint at which the decay begins; None if it is gone, or was never reached."""
        step = (int(decayed.varied[TOKENS]) - int(decayed.varied[DECAY])) // self.pilots.batch_tokens
        path = RunDirectory(folder / stable.digest).checkpoints / f"step-{step:08d}"
        return path if path.is_dir() else None

    def _extend(self) -> bool:
        """Add a learning rate where the best one is at an end of those tried; return whether any was added."""
        added = False
        for size in self.pilots.sizes:
            lrs = self.lrs[size]
            if len(lrs) < 2 or any(self.results.get(job) is None for job in self._decayed(size)):
                continue
            best = [group.best for group in self.groups(size)]
            for end, factor in ((0, lrs[0] / lrs[1]), (-1, lrs[-1] / lrs[-2])):
                count = self._extended.get((size, end), 0)
                if lrs[end] in best and count < MAX_EXTENSIONS:
                    self._extended[size, end] = count + 1
                    lrs.append(rounded(lrs[end] * factor))
                    lrs.sort()
                    added = True
                    break
        return added


def rounded(lr: float) -> float:
    """Return a learning rate with the digits that a job has."""
    return float(f"{lr:.4g}")
