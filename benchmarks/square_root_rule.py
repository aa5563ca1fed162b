"""When does a batch k times as large, at sqrt(k) times the learning rate, train as well? And does a noise scale tell?

    python -m benchmarks.square_root_rule --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.square_root_rule ... --report        # tables of the results so far

One run of AdamW at a constant learning rate and batch for each seed; at several points of it recipes.critical_batch
continues with batches of k B at lr sqrt(k), k = 1, 2, 4, 8, on the same tokens. The gap is the loss on all held-out
text at the end of a branch, above that of k = 1. Each result is one line of --results, and is not measured again.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.shared import machine, mean_and_deviation
from benchmarks.text_runs import SHARED, SIZES, comparison_parser, text_keys
from components.metrics.jsonl import read_rows
from components.plotting import import_pyplot, save_figure
from recipes.cli import ROOT

BATCH, LENGTH = 16, 128
POINTS = (50, 100, 150, 250, 400, 600)
"""Steps of the run from which branches start."""
BRANCH_TOKENS = 163_840
"""10 steps of the largest batch."""
GAP = 0.02
"""Nats per token: the critical batch is the one at which the gap crosses this."""
BINS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Upper ends of batch / noise scale."""
SENSORS = {"noise_scale": "Euclidean", "noise_scale_adam": "Adam"}


@dataclass(frozen=True)
class Measurement:
    """The branches of one point of the run of one seed."""

    seed: int
    step: int
    noise_scales: Mapping[str, float | None]
    gaps: Mapping[int, float]
    """k -> held-out loss above that of k = 1, nats per token; without the branches that diverged."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Measurement:
        losses = {branch["k"]: branch["val_loss"] for branch in row["branches"] if branch["val_loss"] is not None}
        gaps = {k: loss - losses[1] for k, loss in losses.items()}
        return cls(row["seed"], row["step"], {name: row.get(name) for name in SENSORS}, gaps)

    @property
    def critical_batch(self) -> float | None:
        """The batch at which the gap crosses GAP, interpolated in log k; None outside of the branches."""
        found = sorted(self.gaps.items())
        for (smaller, below), (larger, above) in pairwise(found):
            if below <= GAP < above:
                position = (GAP - below) / (above - below)
                return BATCH * smaller * (larger / smaller) ** position
        return None


def run(recipe: Path, settings: Mapping[str, Any]) -> None:
    """Run a recipe; a run of it that was interrupted continues. Raises CalledProcessError if it fails."""
    resumes = (Path(settings["run.dir"]) / "config.toml").exists()
    command: list[Any] = [
        sys.executable,
        ROOT / "recipes",
        recipe,
        *(f"--{key}={value}" for key, value in settings.items()),
    ]
    subprocess.run([*command, *(["--resume"] if resumes else [])], check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path, text: Mapping[str, Path], lr: float, seed: int) -> Iterator[dict[str, Any]]:
    """Train the run of a seed in `folder`, unless that is done, and yield the result of each point."""
    folder.mkdir(parents=True, exist_ok=True)
    own_text = ROOT / "train_configs" / "own_text.toml"
    branches = folder / "branches.toml"
    branches.write_text(f'recipe = "recipes.critical_batch:CriticalBatch"\nextends = ["{own_text}"]\n')
    shared = {name: value for name, value in SHARED.items() if "decay" not in name} | {
        **SIZES["1M"], **{key: path.absolute() for key, path in text.items()},
        "training.micro_batch_size": 4, "run.seed": seed,
    }  # fmt: skip
    trained = folder / "run"
    settings = {
        "run.dir": trained, "batch.initial_size": BATCH, "training.total_tokens": POINTS[-1] * BATCH * LENGTH,
        "lr_schedule.use": "components.lr_schedules:Constant", "lr_schedule.max_lr": lr,
        "lr_schedule.warmup_tokens": POINTS[0] * BATCH * LENGTH // 2, "checkpoint.interval_steps": math.gcd(*POINTS),
        "checkpoint.keep_last": "none",
    }  # fmt: skip
    run(own_text, shared | settings)
    for step in POINTS:
        directory = folder / f"from-{step}"
        settings = {
            "run.dir": directory, "branches.checkpoint": trained / "checkpoints" / f"step-{step:08d}",
            "branches.tokens": BRANCH_TOKENS, "branches.batch_multipliers": "[1, 2, 4, 8]", "branches.batch": BATCH,
            "branches.lr": lr, "checkpoint.interval_steps": "none", "gradient_noise.interval_steps": 1,
            "gradient_noise.norms": '["l2", "adam"]',
        }  # fmt: skip
        run(branches, shared | settings)
        report = json.loads((directory / "critical_batch.json").read_text())
        kept = {key: report.get(key) for key in (*SENSORS, "branches")}
        yield {"seed": seed, "step": step, "lr": lr, **kept}


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < value for v in values) + sum(v == value for v in values) / 2 for value in values]

    return statistics.correlation(ranks(one), ranks(other))


def report(found: Sequence[Measurement]) -> Iterator[str]:
    """Yield the tables: by point, the gap by batch / noise scale, and how well each noise scale predicts."""
    yield "| step | noise scale | in the norm of Adam | gap, k = 2 | k = 4 | k = 8 | critical batch |"
    yield "|---|---|---|---|---|---|---|"
    for step in POINTS:
        here = [each for each in found if each.step == step]
        if not here:
            continue
        scales = [
            mean_and_deviation([scale for each in here if (scale := each.noise_scales[name])], ".0f")
            for name in SENSORS
        ]
        gaps = [mean_and_deviation([each.gaps[k] for each in here if k in each.gaps], ".4f") for k in (2, 4, 8)]
        known = [batch for each in here if (batch := each.critical_batch) is not None]
        cell = mean_and_deviation(known, ".0f") + (f" ({len(known)} of {len(here)})" if len(known) < len(here) else "")
        yield f"| {step} | {' | '.join((*scales, *gaps, cell))} |"
    yield ""
    yield f"| batch / noise scale at most | {' | '.join(f'gap, {name}' for name in SENSORS.values())} |"
    yield "|---" * (1 + len(SENSORS)) + "|"
    for low, high in zip((0.0, *BINS), (*BINS, math.inf), strict=True):
        cells = []
        for name in SENSORS:
            near = [
                gap
                for each in found
                for k, gap in each.gaps.items()
                if k > 1 and (scale := each.noise_scales[name]) and low < k * BATCH / scale <= high
            ]
            cells.append(f"{mean_and_deviation(near, '.4f')} ({len(near)})")
        yield f"| {high:g} | {' | '.join(cells)} |"
    yield ""
    for name, label in SENSORS.items():
        pairs = [
            (scale, batch)
            for each in found
            if (scale := each.noise_scales[name]) and (batch := each.critical_batch) is not None
        ]
        if len(pairs) > 2:
            ratios = [batch / scale for scale, batch in pairs]
            yield (
                f"{label}: rank correlation with the critical batch {rank_correlation(*zip(*pairs, strict=True)):.2f} "
                f"over {len(pairs)} points; critical batch / noise scale {mean_and_deviation(ratios, '.2f')}"
            )


def plot_gaps(found: Sequence[Measurement], output: Path) -> None:
    """Plot the gap against batch / noise scale, a panel for each norm. Raises ValueError without matplotlib."""
    figure, axes = import_pyplot().subplots(1, len(SENSORS), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (name, label) in zip(axes, SENSORS.items(), strict=True):
        for number, step in enumerate(POINTS):
            points = [
                (k * BATCH / scale, gap)
                for each in found
                for k, gap in each.gaps.items()
                if k > 1 and each.step == step and (scale := each.noise_scales[name])
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "o", color=f"C{number}", label=f"step {step}")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set(xlabel=f"batch / noise scale, {label}", ylabel="gap, nats per token")
    axes[0].legend()
    save_figure(figure, output)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = comparison_parser("square_root_rule", __doc__, runs_at_a_time=False)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/square_root_rule.svg"))
    parser.add_argument("--lr", type=float, default=1.4e-3, help="learning rate at the batch of k = 1")
    parser.add_argument("--work", type=Path, default=Path("runs/square_root_rule"), help="directory of the runs")
    options = parser.parse_args(arguments)
    done = read_rows(options.results)
    known = {(row["seed"], row["step"], row["lr"]) for row in done}
    for seed in range(0 if options.report else options.seeds):
        if known >= {(seed, step, options.lr) for step in POINTS}:
            continue
        folder = options.work.absolute() / f"lr-{options.lr:g}-seed-{seed}"
        for row in measure(folder, text_keys(options), options.lr, seed):
            if (seed, row["step"], options.lr) not in known:
                done.append(row)
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"seed {seed}, step {row['step']}: done", file=sys.stderr, flush=True)
    print(f"{machine()}\n")
    found = [Measurement.from_row(row) for row in done if row["lr"] == options.lr]
    print("\n".join(report(found)))
    try:
        plot_gaps(found, options.picture)
    except ValueError as error:  # no matplotlib
        print(error, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
