"""Train one recipe over grids of its keys.

    python -m tools.sweep mine.toml --results sweep.jsonl --jobs 2 \\
        --grid model.dim=64,128 model.heads=2,4 --grid batch.initial_size=8,32 --grid training.total_tokens=300K,1.2M \\
        --grid lr_schedule.max_lr=1e-3,2e-3,4e-3,8e-3 --grid run.seed=0,1 --training.precision=float32

Keys of one --grid vary together, value by value; grids are crossed. All other --section.key=value apply to every run.
Each run is started as by ./run_train.sh. Runs in the result file are not run again, so a sweep can be stopped at any
time and continues with the same command; a run is recognized by its configuration and the content of its data.
The table has the mean loss over seeds (run.seed) of each setting, the lowest in bold. The best learning rates and their
scaling law: python -m benchmarks.lr_transfer.analysis, with the same arguments.
Exit status: 0 done, 1 a run was killed, 2 for a user error, 129, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from components.standard_streams import run_command
from recipes.cli import parse_recipe, reports_bad_input
from tools.sweep.grid import SEED, Job, Sweep, parse_grid
from tools.sweep.outcome import Outcome
from tools.sweep.runner import Results, Runner, processes_per_run, report_stop


@reports_bad_input
def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser("python -m tools.sweep", __doc__)
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="keep the run directories here")
    parser.add_argument("--retry", action="store_true", help="also run the failed runs again")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options, rest = parser.parse_known_args(arguments)
    try:
        jobs, results = read_sweep(options, rest)
        killed = 0 if options.report else Runner(results, options.jobs, options.runs).run(jobs, again=options.retry)
        print("\n".join(report_lines(jobs, results)))
    except KeyboardInterrupt as stop:
        return report_stop(stop)
    return 1 if killed else 0


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that say which runs a sweep has."""
    usage = "%(prog)s [CONFIG.toml] --grid KEY=VALUE,... [KEY=VALUE,...] [--grid ...] --results FILE [options] "
    usage += "[--section.key=value]..."
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=description.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--grid", nargs="+", action="append", default=[], metavar="KEY=VALUE,...")
    parser.add_argument("--results", type=Path, required=True, help="one JSON line per run; created if missing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    return parser


def read_sweep(options: argparse.Namespace, rest: Sequence[str]) -> tuple[list[Job], Results]:
    """Return the runs and the results of a command line. Raises UsageError, ValueError or OSError."""
    command = parse_recipe(rest)
    common = {override.path: override.text for override in command.overrides}
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: expected at least 1")
    grids = [parse_grid(texts) for texts in options.grid]
    sweep = Sweep(command.config, common, grids, partial(processes_per_run, options.jobs))
    return sweep.jobs(), Results(options.results)


def report_lines(jobs: Sequence[Job], results: Results) -> Iterator[str]:
    """Yield a table of the settings with their mean loss over seeds, the lowest in bold, and the failed runs."""
    done = [(job, outcome) for job in jobs if (outcome := results.get(job)) is not None]
    failed = [(job, outcome) for job, outcome in done if outcome.failure]
    yield f"{len(done)} of {len(jobs)} runs are done, {len(failed)} of them failed"
    groups: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for job, outcome in done:
        groups.setdefault(tuple(item for item in job.varied.items() if item[0] != SEED), []).append(outcome)
    means = {key: sum(outcome.loss for outcome in group) / len(group) for key, group in groups.items()}
    best = min(means.values(), default=math.inf)
    if math.isfinite(best):
        yield ""
        yield f"| {' | '.join([*(name for name, _ in next(iter(groups))), 'loss', 'runs', 'steps', 'seconds'])} |"
        yield "|---" * (len(next(iter(groups))) + 4) + "|"
        for key, group in groups.items():
            loss = f"{means[key]:.4f}" if math.isfinite(means[key]) else "failed"
            loss = f"**{loss}**" if means[key] == best else loss
            sums = [f"{sum(getattr(run, name) for run in group) / len(group):.0f}" for name in ("steps", "seconds")]
            yield f"| {' | '.join([*(value for _, value in key), loss, str(len(group)), *sums])} |"
    yield from (f"\n{job}: {outcome}" for job, outcome in failed)


if __name__ == "__main__":
    sys.exit(run_command(main))
