"""Runs of the comparison by tools.sweep: a method under a schedule, with a learning rate, a seed and a length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.adaptive_batch.methods import SHARED, SIZES, method_of, schedule
from benchmarks.shared import ROOT
from recipes.config import Override, load
from tools.sweep.grid import Fingerprints, Job, Settings, digest
from tools.sweep.outcome import Outcome
from tools.sweep.runner import Results, Runner

RECIPE = ROOT / "train_configs" / "own_text.toml"
POINTS = 200
"""Points kept of the loss curve of a final run."""

Row = tuple[str, str]
"""A method and a schedule."""


@dataclass(frozen=True)
class Run:
    """One run."""

    row: Row
    lr: float
    """The peak learning rate; under Power its amplitude a."""
    seed: int
    tokens: int

    @property
    def labels(self) -> Settings:
        method, kind = self.row
        values = {"method": method, "schedule": kind, "lr": self.lr, "seed": self.seed, "tokens": self.tokens}
        return {name: str(value) for name, value in values.items()}

    @staticmethod
    def from_labels(labels: Settings) -> Run:
        row = (labels["method"], labels["schedule"])
        return Run(row, float(labels["lr"]), int(labels["seed"]), int(labels["tokens"]))


def settings_of(run: Run, size: str) -> dict[str, str]:
    """Return the recipe keys of a run with a model of `SIZES`, except the paths of its text."""
    name, kind = run.row
    method = method_of(name)
    settings = {
        "run.seed": run.seed, "run.device": "cpu", "training.precision": "float32",
        "training.total_tokens": run.tokens, **SHARED, **SIZES[size],
        **method.settings, **schedule(kind, run.lr, method),
        "validation.interval_steps": "none", "validation.max_sequences": "none", "validation.micro_batch_size": 16,
    }  # fmt: skip
    return {key: str(value) for key, value in settings.items()}


class ResultBook:
    """Outcomes by run, stored in a file: a run in it is not run again, unless its settings have changed."""

    def __init__(
        self,
        results: Results,
        text: Mapping[str, Path] | None,
        final_tokens: int,
        at_a_time: int = 1,
        size: str = "0.7M",
    ) -> None:
        """Open the results.

        `text`: the paths of data, validation data and tokenizer, by key; None to report only. `final_tokens`: the
        length of the runs whose curve is kept. `size`: the model of all runs, which their labels do not name.
        """
        self.results, self.text, self.final_tokens, self.size = results, text, final_tokens, size
        self._runners = {final: Runner(results, at_a_time, curve_points=POINTS * final) for final in (False, True)}
        self._jobs: dict[Run, Job] = {}
        self._fingerprints: Fingerprints = {}

    def run(self, runs: Iterable[Run]) -> list[Outcome]:
        """Return the outcomes of `runs`; run those that are not in the file. Raises ValueError for bad input."""
        runs = list(runs)
        for final, runner in self._runners.items():
            killed = runner.run([self._job(run) for run in runs if (run.tokens == self.final_tokens) == final])
            if killed:
                raise ValueError(f"{killed} runs were killed; the same command runs them again")
        return [outcome for run in runs if (outcome := self.results.get(self._job(run))) is not None]

    def finals(self) -> dict[Row, dict[float, list[Outcome]]]:
        """Return the outcomes of the final runs in the file, by learning rate, in the order of their seeds.

        Without the text, runs are identified by their labels only, and the latest of each label counts.
        """
        found: dict[Row, dict[float, list[Outcome]]] = {}
        outcomes = {Run.from_labels(varied): outcome for varied, outcome in self.results.items()}
        for run in sorted((run for run in outcomes if run.tokens == self.final_tokens), key=lambda run: run.seed):
            outcome = outcomes[run] if self.text is None else self.results.get(self._job(run))
            if outcome is not None:  # None: its recipe has changed since
                found.setdefault(run.row, {}).setdefault(run.lr, []).append(outcome)
        return found

    def _job(self, run: Run) -> Job:
        if run not in self._jobs:
            assert self.text is not None
            settings = {**settings_of(run, self.size), **{key: str(path.absolute()) for key, path in self.text.items()}}
            config = load(RECIPE, [Override(key, value) for key, value in settings.items()])
            self._jobs[run] = Job(RECIPE, settings, run.labels, digest(config, self._fingerprints))
        return self._jobs[run]
