"""Train one recipe over grids of its keys, and say what is the best learning rate.

    python -m tools.sweep mine.toml --results sweep.jsonl --jobs 2 \\
        --grid model.dim=64,128 model.heads=2,4 --grid batch.initial=8,32 --grid training.total_tokens=300K,1.2M \\
        --grid lr_schedule.max_lr=1e-3,2e-3,4e-3,8e-3 --grid run.seed=0,1 --training.precision=float32
    python -m tools.sweep ... --report --output sweep.svg     # the table and the picture of what is done so far

Keys of one --grid go together, value by value; grids are crossed. All other --section.key=value hold for every run.
Each run is started as ./run_train.sh starts it. What is in the file of results is not run again, so a sweep can be
stopped at any time and goes on with the same command; a run is recognised by its configuration and the content of its
data. Of seeds (run.seed) the mean counts. A picture needs the `plot` extra.
Exit status: 0 done, 1 a run was killed, 2 for what the user can put right, 129, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from components.standard_streams import run_command
from recipes.cli import UsageError, parse_recipe
from tools.sweep.cells import in_cells, rate_of
from tools.sweep.devices import processes_of_a_run
from tools.sweep.grid import Job, Sweep, parse_grid
from tools.sweep.report import draw, lines
from tools.sweep.runs import Results, Runner, stopped

RATES = ("lr_schedule.max_lr", "lr_schedule.a")
"""What is tuned, if it is varied and --rate does not say."""


def main(arguments: Sequence[str] | None = None) -> int:
    options, rest = parser().parse_known_args(arguments)
    try:
        command = parse_recipe(rest)
        common = {override.path: override.text for override in command.overrides}
        if options.jobs < 1:
            raise ValueError(f"--jobs {options.jobs}: at least 1")
        grids = [parse_grid(texts) for texts in options.grid]
        sweep = Sweep(command.config, common, grids, partial(processes_of_a_run, options.jobs))
        jobs, results = sweep.jobs(), Results(options.results)
        rate_key = find_rate(jobs, options.rate)
        killed = 0 if options.report else Runner(results, options.jobs, options.runs).run(jobs, again=options.retry)
        report(jobs, results, rate_key, options.output)
    except KeyboardInterrupt as stop:
        return stopped(stop)
    except (UsageError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if killed else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m tools.sweep",
        usage="%(prog)s [CONFIG.toml] --grid KEY=VALUE,... [KEY=VALUE,...] [--grid ...] --results FILE [options] "
        "[--section.key=value]...",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    found.add_argument("--grid", nargs="+", action="append", default=[], metavar="KEY=VALUE,...")
    found.add_argument("--results", type=Path, required=True, help="file of JSON lines, one a run; made if absent")
    found.add_argument("--jobs", type=int, default=1, help="runs at a time (1); they share the cores")
    found.add_argument("--rate", metavar="KEY", help=f"the key whose best value is sought ({' or '.join(RATES)})")
    found.add_argument("--output", type=Path, metavar="PICTURE", help="loss against rate: .svg, .png or .pdf")
    found.add_argument("--runs", type=Path, metavar="FOLDER", help="keep the run directories here")
    found.add_argument("--retry", action="store_true", help="run again what failed")
    found.add_argument("--report", action="store_true", help="run nothing")
    return found


def find_rate(jobs: Sequence[Job], asked: str | None) -> str:
    """Raises ValueError where it is not varied, or is no number."""
    found = next((key for key in ([asked] if asked else RATES) if key in jobs[0].varied), None)
    if found is None:
        raise ValueError(f"{asked or ' or '.join(RATES)} is not varied by a --grid; --rate names the key that is tuned")
    for job in jobs:
        rate_of(job, found)
    return found


def report(jobs: Sequence[Job], results: Results, rate_key: str, output: Path | None) -> None:
    done = [(job, outcome) for job in jobs if (outcome := results.get(job)) is not None]
    failed = [(job, outcome) for job, outcome in done if outcome.failure]
    print(f"{len(done)} of {len(jobs)} runs are done, {len(failed)} of them failed\n")
    if len(failed) == len(done):
        print("\n".join(f"{job}: {outcome}" for job, outcome in failed))
        return
    cells = in_cells(done, rate_key)
    print("\n".join([*lines(cells, rate_key), *(f"\n{job}: {outcome}" for job, outcome in failed)]))
    if output is not None:
        draw(cells, rate_key, output)
        print(f"\nwrote {output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
