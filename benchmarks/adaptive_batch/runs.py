"""Runs of the comparison: a method under a schedule, at one rate and seed and of one length, by tools.sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.adaptive_batch.methods import SIZE, method_of, schedule
from benchmarks.measure import ROOT
from recipes.config import Override, load
from tools.sweep.grid import Fingerprints, Job, Settings, digest
from tools.sweep.runner import Outcome, Results, Runner

RECIPE = ROOT / "train_configs" / "own_text.toml"
POINTS = 200
"""Points that are kept of the loss curve of a final run."""

Row = tuple[str, str]
"""A method and a schedule."""


@dataclass(frozen=True)
class Run:
    """One of them."""

    row: Row
    rate: float
    seed: int
    tokens: int

    @property
    def labels(self) -> Settings:
        method, kind = self.row
        told = {"method": method, "schedule": kind, "rate": self.rate, "seed": self.seed, "tokens": self.tokens}
        return {name: str(value) for name, value in told.items()}

    @staticmethod
    def labelled(labels: Settings) -> Run:
        row = (labels["method"], labels["schedule"])
        return Run(row, float(labels["rate"]), int(labels["seed"]), int(labels["tokens"]))


def settings_of(run: Run) -> dict[str, str]:
    """The keys of a recipe that make a run what it is, but for its text."""
    name, kind = run.row
    method = method_of(name)
    settings = {
        "run.seed": run.seed, "run.device": "cpu", "training.precision": "float32",
        "training.total_tokens": run.tokens, **SIZE, **method.settings, **schedule(kind, run.rate, method),
        "validation.interval_steps": "none", "validation.max_sequences": 512, "validation.micro_batch_size": 16,
    }  # fmt: skip
    return {key: str(value) for key, value in settings.items()}


class Book:
    """Outcomes by run, kept in a file: what is in it is not run again, unless it was set up otherwise."""

    def __init__(
        self, results: Results, text: Mapping[str, Path] | None, final_tokens: int, at_a_time: int = 1
    ) -> None:
        """`text`: the paths of data, validation data and tokenizer, by key; None to report only.

        The curve of runs of `final_tokens` is kept.
        """
        self.results, self.text, self.final_tokens = results, text, final_tokens
        self._runners = {final: Runner(results, at_a_time, curve_points=POINTS * final) for final in (False, True)}
        self._jobs: dict[Run, Job] = {}
        self._fingerprints: Fingerprints = {}

    def run(self, runs: Iterable[Run]) -> list[Outcome]:
        """Those of `runs`, from the file or, minutes each, from a run. Raises ValueError for bad input."""
        runs = list(runs)
        for final, runner in self._runners.items():
            killed = runner.run([self._job(run) for run in runs if (run.tokens == self.final_tokens) == final])
            if killed:
                raise ValueError(f"{killed} runs were killed; the same command runs them again")
        return [outcome for run in runs if (outcome := self.results.get(self._job(run))) is not None]

    def finals(self) -> dict[Row, dict[float, list[Outcome]]]:
        """Return the outcomes of the final runs in the file, by learning rate, in the order of their seeds.

        Without the text they are known by their labels alone, and the latest of each label counts.
        """
        found: dict[Row, dict[float, list[Outcome]]] = {}
        labelled = {Run.labelled(varied): outcome for varied, outcome in self.results.items()}
        for run in sorted((run for run in labelled if run.tokens == self.final_tokens), key=lambda run: run.seed):
            outcome = labelled[run] if self.text is None else self.results.get(self._job(run))
            if outcome is not None:  # None: its recipe has changed since
                found.setdefault(run.row, {}).setdefault(run.rate, []).append(outcome)
        return found

    def _job(self, run: Run) -> Job:
        if run not in self._jobs:
            assert self.text is not None
            settings = {**settings_of(run), **{key: str(path.absolute()) for key, path in self.text.items()}}
            config = load(RECIPE, [Override(key, value) for key, value in settings.items()])
            self._jobs[run] = Job(RECIPE, settings, run.labels, digest(config, self._fingerprints))
        return self._jobs[run]
