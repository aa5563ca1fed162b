"""Can a run without decay, averaged, be stopped at any time? Compare Power and its averages with WSD decays.

    python -m benchmarks.anytime --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.anytime ... --report        # table of the results so far

At a quarter, a half and all of the tokens: WSD that decays to its end there (its stable phase is the same in all three,
so these are branches of one run), and Power without decay with exponential averages of the weights. Both learning rates
are tuned over factors of sqrt(2), at all of the tokens, and the best one is run with all seeds at every horizon.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared import mean_and_deviation
from benchmarks.text_runs import SHARED, SIZES, WARMUP, comparison_parser, run_and_report, text_keys, text_run
from tools.sweep.grid import Job, Settings
from tools.sweep.runner import Outcome, Results

HORIZONS = (0.25, 0.5, 1.0)
"""Fractions of the tokens at which the runs are compared."""
HALF_LIVES = (0.01, 0.03, 0.1)
"""Of the averages, as fractions of all tokens."""
TOLERANCE = 0.005
METHODS: dict[str, tuple[Settings, str, Sequence[float]]] = {
    "WSD": ({}, "lr_schedule.max_lr", (1.4e-3, 2e-3, 2.8e-3, 4e-3)),
    "Power": (
        {
            "lr_schedule.use": "components.lr_schedules:Power",
            "lr_schedule.decay_tokens": "0",
            "lr_schedule.max_lr": "0.02",
        },
        "lr_schedule.a",
        (0.7, 1.0, 1.4, 2.0, 2.8),
    ),
}
"""Name -> its settings, the key that is tuned, and its values."""


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
        averages = {} if method == "WSD" else _averages(self.tokens)
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
        shared = {name: each for name, each in SHARED.items() if method == "WSD" or "decay" not in name}
        return text_run(varied, self.text, shared)

    def loss(self, method: str, outcome: Outcome) -> float:
        """Return the validation loss that a method is judged by: for Power, of its best average."""
        return outcome.loss if method == "WSD" else min(outcome.average_losses.values(), default=math.inf)

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
        """Yield a row for each horizon: the losses of WSD, Power, and each average, and the gap."""
        best = {method: self.best(method) for method in METHODS}
        names = list(_half_lives(self.tokens))
        yield f"| tokens | WSD | Power | {' | '.join(f'average, {name}' for name in names)} | best average to WSD |"
        yield "|---" * (4 + len(names)) + "|"
        for at in HORIZONS:
            outcomes = {
                method: [
                    outcome
                    for seed in range(self.seeds)
                    if (outcome := self.results.get(self.job(method, value, at, seed))) is not None
                ]
                for method, value in best.items()
                if value is not None
            }
            if len(outcomes) < len(METHODS) or not all(outcomes.values()):
                continue
            wsd, power = ([each.loss for each in outcomes[method]] for method in ("WSD", "Power"))
            averaged = [[each.average_losses.get(name, math.inf) for each in outcomes["Power"]] for name in names]
            gap = min(statistics.fmean(losses) for losses in averaged) / statistics.fmean(wsd) - 1
            cells = [
                f"{round(self.tokens * at):,}",
                *(mean_and_deviation(losses) for losses in (wsd, power, *averaged)),
            ]
            yield f"| {' | '.join(cells)} | {gap:+.2%}{' *' * (gap <= TOLERANCE)} |"
        yield ""
        yield f"best: {best}; mean and standard deviation over seeds; * within {TOLERANCE:.1%}"


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
