"""Training runs on a text that benchmarks compare: options, small models, one run, and the loop of running them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.shared import machine
from recipes.cli import ROOT
from tools.sweep.grid import Job, Settings, Sweep
from tools.sweep.runner import Results, Runner, report_stop

SHARED: Settings = {
    "training.sequence_length": "128", "training.micro_batch_size": "8", "training.precision": "float32",
    "run.device": "cpu", "gradient_noise.interval_steps": "none", "validation.interval_steps": "none",
    "validation.max_sequences": "none", "validation.micro_batch_size": "16",
    "lr_schedule.decay": "1-sqrt", "lr_schedule.decay_fraction": "0.3",
}  # fmt: skip
"""Settings of all runs."""
SIZES: dict[str, Settings] = {
    "1M": {"model.dim": "128", "model.layers": "4", "model.heads": "4", "model.kv_heads": "4", "model.ffn_dim": "384"},
    "5M": {"model.dim": "256", "model.layers": "6", "model.heads": "8", "model.kv_heads": "8", "model.ffn_dim": "768"},
}
"""Settings of the model, by its number of parameters."""
WARMUP = 0.05
"""Fraction of the tokens."""


def text_run(varied: Settings, text: Mapping[str, Path], shared: Settings = SHARED) -> Job:
    """Return the run with the settings `varied` and `shared` on the files that `text` gives for keys of a recipe."""
    paths = {key: str(path.absolute()) for key, path in text.items()}
    (job,) = Sweep(ROOT / "train_configs" / "own_text.toml", {**shared, **paths}, [[varied]]).jobs()
    return job


def comparison_parser(
    name: str, description: str | None, seeds: int = 3, *, runs_at_a_time: bool = True
) -> argparse.ArgumentParser:
    """Return a parser of the options of every comparison; results are kept in docs/data/`name`.jsonl."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to validate on")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tiktoken file of 2048 entries")
    parser.add_argument("--seeds", type=int, default=seeds)
    if runs_at_a_time:
        parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--results", type=Path, default=Path("docs/data") / f"{name}.jsonl")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser


def text_keys(options: argparse.Namespace) -> dict[str, Path]:
    """Return the keys of a recipe that the options of the text set."""
    return {"data.path": options.train, "validation.data.path": options.valid, "tokenizer.path": options.tokenizer}


def run_and_report(
    options: argparse.Namespace,
    wanted: Callable[[Results], Iterable[Job]],
    report: Callable[[Results], None],
) -> int:
    """Run the jobs that `wanted` returns until all of them have outcomes, then print the report; return the status.

    Outcomes are kept in `options.results`, those of failed runs too; with `options.report` nothing is run.
    """
    try:
        results = Results(options.results)
        killed = 0
        while not options.report and not killed:
            jobs = [job for job in wanted(results) if results.get(job) is None]
            if not jobs:
                break
            killed = Runner(results, options.jobs).run(jobs)
        print(f"{machine()}\n")
        report(results)
    except KeyboardInterrupt as stop:
        return report_stop(stop)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if killed else 0
