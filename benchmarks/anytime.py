"""Can a run without decay, averaged, be stopped at any time? Compare schedules without decay with WSD decays.

    python -m benchmarks.anytime --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.anytime ... --report        # table of the results so far

At a quarter, a half and all of the tokens: WSD that decays to its end there (its stable phase is the same in all three,
so these are branches of one run), and Power without decay and a constant learning rate, with exponential averages of
the weights; the same with muP, which Power is designed for. Learning rates are tuned over factors of sqrt(2), at all of
the tokens, and the best one is run with all seeds at every horizon.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lr_transfer.methods import MUP
from benchmarks.shared import mean_and_deviation
from benchmarks.text_runs import SHARED, SIZES, WARMUP, comparison_parser, run_and_report, text_keys, text_run
from tools.sweep.grid import Job, Settings
from tools.sweep.outcome import Outcome
from tools.sweep.runner import Results

HORIZONS = (0.25, 0.5, 1.0)
"""Fractions of the tokens at which the runs are compared."""
HALF_LIVES = (0.01, 0.03, 0.1)
"""Of the averages, as fractions of all tokens."""
TOLERANCE = 0.005
POWER: Settings = {
    "lr_schedule.use": "components.lr_schedules:Power",
    "lr_schedule.decay_tokens": "0",
    "lr_schedule.max_lr": "0.02",
}
CONSTANT: Settings = {"lr_schedule.use": "components.lr_schedules:Constant"}
METHODS: dict[str, tuple[Settings, str, Sequence[float]]] = {
    "WSD": ({}, "lr_schedule.max_lr", (1.4e-3, 2e-3, 2.8e-3, 4e-3)),
    "Power": (POWER, "lr_schedule.a", (0.7, 1.0, 1.4, 2.0, 2.8)),
    "WSD, muP": (MUP, "lr_schedule.max_lr", (4e-3, 5.6e-3, 8e-3, 11e-3)),
    "Power, muP": ({**MUP, **POWER}, "lr_schedule.a", (2.0, 2.8, 4.0, 5.6)),
    "Constant, muP": ({**MUP, **CONSTANT}, "lr_schedule.max_lr", (2e-3, 2.8e-3, 4e-3, 5.6e-3)),
}
"""Name -> its settings, the key that is tuned, and its values."""
BASELINES = {"Power": "WSD", "Power, muP": "WSD, muP", "Constant, muP": "WSD, muP"}
"""Schedule without decay -> what it is compared with."""


@dataclass(frozen=True)
class Comparison:
    """The runs, and what is known of them."""

    results: Results
    text: Mapping[str, Path]
    tokens: int
    seeds: int

    def job(self, method: str, value: float, fraction: float = 1.0, seed: int = 0) -> Job:
        """Return the run of a method to a fraction of the tokens."""
        settings, key, _ = METHODS[method]
        averages = _averages(self.tokens) if method in BASELINES else {}
        varied = {
            **SIZES["1M"],
            **settings,
            **averages,
            key: f"{value:g}",
            "batch.initial_size": "32",
            "training.total_tokens": str(round(self.tokens * fraction)),
            "lr_schedule.warmup_tokens": str(round(WARMUP * self.tokens)),
            "run.seed": str(seed),
        }
        shared = {name: each for name, each in SHARED.items() if method not in BASELINES or "decay" not in name}
        return text_run(varied, self.text, shared)

    def loss(self, method: str, outcome: Outcome) -> float:
        """Return the validation loss that a method is judged by: without decay, of its best average."""
        return min(outcome.average_losses.values(), default=math.inf) if method in BASELINES else outcome.loss

    def best(self, method: str) -> float | None:
        """Return the best value of the tuned key, or None before all were tried."""
        values = METHODS[method][2]
        found = {value: self.results.get(self.job(method, value)) for value in values}
        done = {value: self.loss(method, outcome) for value, outcome in found.items() if outcome is not None}
        return min(done, key=done.__getitem__) if len(done) == len(values) else None

    def wanted(self) -> Iterator[Job]:
        """Yield the runs that are known to be needed."""
        for method, (_, _, values) in METHODS.items():
            if (best := self.best(method)) is None:
                yield from (self.job(method, value) for value in values)
            else:
                yield from (self.job(method, best, at, seed) for at in HORIZONS for seed in range(self.seeds))

    def report(self) -> Iterator[str]:
        """Yield a row for each method and horizon: its loss, that of each average, and the gap of the best to WSD."""
        names = list(_half_lives(self.tokens))
        yield f"| tokens | schedule | loss | {' | '.join(f'average, {name}' for name in names)} | best average to WSD |"
        yield "|---" * (4 + len(names)) + "|"
        for at in HORIZONS:
            for method in METHODS:
                outcomes = self.outcomes(method, at)
                baseline = self.outcomes(BASELINES.get(method, method), at)
                if not outcomes or not baseline:
                    continue
                cells = [f"{round(self.tokens * at):,}", method, mean_and_deviation([each.loss for each in outcomes])]
                if method not in BASELINES:
                    yield f"| {' | '.join(cells)} |{' |' * (len(names) + 1)}"
                    continue
                averaged = [[each.average_losses.get(name, math.inf) for each in outcomes] for name in names]
                best = min(map(statistics.fmean, averaged))
                gap = best / statistics.fmean(each.loss for each in baseline) - 1
                cells += [mean_and_deviation(losses) for losses in averaged]
                yield f"| {' | '.join(cells)} | {gap:+.2%}{' *' * (gap <= TOLERANCE)} |"
        best_values = {method: self.best(method) for method in METHODS}
        yield ""
        yield f"best: {best_values}; mean and standard deviation over seeds; * within {TOLERANCE:.1%}"

    def outcomes(self, method: str, at: float) -> list[Outcome]:
        """Return the outcomes of the seeds at the best value, none before it is known."""
        if (value := self.best(method)) is None:
            return []
        found = [self.results.get(self.job(method, value, at, seed)) for seed in range(self.seeds)]
        return [outcome for outcome in found if outcome is not None]


def _half_lives(tokens: int) -> dict[str, int]:
    """Return the name and the half-life in tokens of each average."""
    return {f"h{round(100 * fraction)}": round(tokens * fraction) for fraction in HALF_LIVES}


def _averages(tokens: int) -> Settings:
    settings: dict[str, str] = {}
    for name, half_life in _half_lives(tokens).items():
        settings[f"average.{name}.use"] = "components.average:Exponential"
        settings[f"average.{name}.half_life_tokens"] = str(half_life)
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    parser = comparison_parser("anytime", __doc__)
    parser.add_argument("--tokens", type=int, default=1_200_000)
    options = parser.parse_args(arguments)

    def comparison(results: Results) -> Comparison:
        return Comparison(results, text_keys(options), options.tokens, options.seeds)

    def report(results: Results) -> None:
        print("\n".join(comparison(results).report()))

    return run_and_report(options, lambda results: comparison(results).wanted(), report)


if __name__ == "__main__":
    sys.exit(main())
