"""Plan a run from small ones.

    python -m tools.plan_run mine.toml --results pilots.jsonl --pilot-sizes 400K,800K,1.5M --pilot-tokens 2M \\
        --parameters 5M --tokens 8M --output plan.toml
    python -m tools.plan_run mine.toml ... --hours 24 --devices 8 --device H100@45% --output plan.toml

Pilot runs train mine.toml at smaller sizes: for each size and learning rate a stable phase of constant batch, and three
decays that branch off from it. Laws of the loss, the learning rate and the gradient noise are fitted to them, and the
answer for the target is written as a recipe (plan.toml) and as a page (plan.md) with the source of every number. Pilot
runs in the result file are not run again, so the command can be stopped at any time, and another target costs nothing.
Needs the `plot` extra. Exit status: 0 done, 1 a run was killed or is missing, 2 for a user error, 129, 130 or 143
stopped by a signal.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from components.standard_streams import run_command
from components.units import parse_count
from recipes.batch_policy import build_batch_rounding
from recipes.cli import parse_recipe, reports_bad_input
from recipes.config import load
from recipes.dry_run.plan import HardwareTarget
from recipes.model_setup import build_tokenizer
from recipes.recipe import require_training
from tools.plan_run.family import Family, Size
from tools.plan_run.ladder import Ladder, Pilots
from tools.plan_run.page import page_lines, write_plan
from tools.plan_run.plan import Plan, Target
from tools.sweep.runner import Results, processes_per_run, report_stop


@reports_bad_input
def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        target = read_target(options)
        ladder, family = read_ladder(options, rest)
        check_target(target, family, options)
        if options.output is not None and options.output.resolve() == ladder.pilots.recipe.resolve():
            raise ValueError(f"--output {options.output} is the recipe to plan for; give another name")
        folder = options.runs or options.results.with_suffix(".runs")
        killed = 0 if options.report else ladder.run(folder, options.jobs)
        if options.retry and not options.report and not killed:
            killed = ladder.retry(options.jobs)
        if killed:
            print(f"{killed} pilot runs were killed; the same command runs them again", file=sys.stderr)
            return 1
        if missing := ladder.missing():
            print(f"{len(missing)} pilot runs are missing, such as {missing[0][1]}; run this without --report")
            return 1
        plan = Plan(ladder, family, target)
        print("\n".join(page_lines(plan)))
        if options.output is not None:
            write_plan(plan, options.output)
            print(f"\nwrote {options.output} and {options.output.with_suffix('.md')}; check it with")
            print(f"  ./run_train.sh {options.output} --dry-run")
    except KeyboardInterrupt as stop:
        return report_stop(stop)
    return 0


def build_parser() -> argparse.ArgumentParser:
    usage = "%(prog)s [CONFIG.toml] --results FILE --pilot-sizes N,N,... --pilot-tokens D TARGET [options] "
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan_run",
        usage=usage + "[--section.key=value]...",
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
    )
    count = _parsed(parse_count, "a count, such as 5M or 1.5B")
    counts = _parsed(lambda text: [parse_count(each) for each in text.split(",")], "a list of counts, such as 400K,2M")
    rates = _parsed(lambda text: [float(each) for each in text.split(",")], "a list of numbers, such as 1e-3,2e-3")
    parser.add_argument("--parameters", type=count, metavar="N", help="target: parameters of the model")
    parser.add_argument("--tokens", type=count, metavar="D", help="target: tokens of the run")
    parser.add_argument("--hours", type=float, help="target: hours, which give the tokens, and without N the size too")
    parser.add_argument("--devices", type=int, default=1, help="number of devices of the target (default: 1)")
    parser.add_argument("--device", default="", metavar="DEVICE[@MFU]", help="as for --dry-run: H100@45%%, cpu")
    parser.add_argument("--output", type=Path, metavar="PLAN.toml", help="the recipe; the page is PLAN.md")
    parser.add_argument("--results", type=Path, required=True, help="one JSON line per pilot run; created if missing")
    parser.add_argument(
        "--pilot-sizes", type=counts, required=True, metavar="N,N,...", help="parameters of pilot models"
    )
    parser.add_argument(
        "--pilot-tokens", type=count, required=True, metavar="D", help="tokens of the longest pilot runs"
    )
    parser.add_argument("--pilot-batch", type=count, metavar="B", help="samples a step (default: the recipe's first)")
    parser.add_argument("--lrs", type=rates, metavar="LR,LR,...", help="first tried (default: half, one, twice)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of every pilot run (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="pilot runs at a time (default: 1)")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="for stable phases (default: RESULTS.runs)")
    parser.add_argument("--retry", action="store_true", help="also run the failed pilot runs again")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser


def read_target(options: argparse.Namespace) -> Target:
    """Return the target of a command line. Raises ValueError for one that says too little or too much."""
    if options.tokens is not None and options.parameters is None:
        raise ValueError("--tokens needs --parameters")
    if (options.tokens is None) == (options.hours is None):
        raise ValueError("give --parameters with --tokens or --hours, or --hours alone")
    for name in ("parameters", "tokens", "hours", "devices", "pilot-tokens", "pilot-batch", "jobs", "seeds"):
        if (value := getattr(options, name.replace("-", "_"))) is not None and not value > 0:
            raise ValueError(f"--{name} {value}: expected a number above 0")
    hardware = HardwareTarget.parse(options.device)
    if options.hours is not None and hardware.device is None:
        raise ValueError("--hours needs --device, such as --device H100@45%")
    return Target(options.parameters, options.tokens, options.hours, options.devices, hardware)


def check_target(target: Target, family: Family, options: argparse.Namespace) -> None:
    """Raise ValueError for what would make a plan impossible, before anything is trained."""
    if target.parameters is not None:
        family.of(target.parameters)
    family.config.recipe.parallel.mesh_shape(target.devices)
    if importlib.util.find_spec("scipy") is None:
        raise ValueError("the laws need scipy: pip install -e '.[plot]'")
    if (output := options.output) is not None:
        if output.suffix != ".toml" or output.is_dir():
            raise ValueError(f"--output {output}: expected the name of a recipe, such as plan.toml")
        if output.exists() and not (output.with_suffix(".md")).exists():
            raise ValueError(f"--output {output} exists, and is not a plan; give another name")


def read_ladder(options: argparse.Namespace, rest: Sequence[str]) -> tuple[Ladder, Family]:
    """Return the pilot runs, and the sizes of the recipe. Raises UsageError, ConfigError, ValueError or OSError."""
    command = parse_recipe(rest)
    config = load(command.config, command.overrides)
    require_training(config)
    recipe = config.recipe
    family = Family(config, build_tokenizer(recipe).vocab_size)
    pilots = Pilots(
        recipe=command.config,
        common={override.path: override.text for override in command.overrides},
        config=config,
        batch=read_pilot_batch(options, recipe),
        sizes=read_pilot_sizes(options, family),
        tokens=options.pilot_tokens,
        lrs=options.lrs or (),
        seeds=options.seeds,
        processes=partial(processes_per_run, options.jobs),
    )
    if not options.lrs:
        middle = getattr(recipe.lr_schedule, pilots.lr_key.partition(".")[2])
        pilots = replace(pilots, lrs=(middle / 2, middle, middle * 2))
    if len(set(pilots.lrs)) < 2 or min(pilots.lrs) <= 0:
        raise ValueError("--lrs: give two learning rates or more, above 0")
    return Ladder(pilots, Results(options.results)), family


def read_pilot_batch(options: argparse.Namespace, recipe: Any) -> int:
    """Return the batch of the pilot runs, rounded up: their checkpoints are counted in steps of it. Raises ValueError
    if it is not known, or too small to measure the noise."""
    batch = options.pilot_batch or getattr(recipe.batch, "initial_size", None)
    if batch is None:
        raise ValueError(f"{type(recipe.batch).__name__} has no initial_size: give --pilot-batch")
    rounding = build_batch_rounding(recipe, processes_per_run(options.jobs, recipe))
    batch = rounding.round_up(batch).samples
    if not rounding.can_measure_noise(rounding.round_up(batch)):
        raise ValueError(f"--pilot-batch {batch}: the noise needs two micro-batches a step; use {2 * batch}")
    return int(batch)


def read_pilot_sizes(options: argparse.Namespace, family: Family) -> list[Size]:
    """Return the sizes of the pilot models, the smallest first. Raises ValueError for fewer than two."""
    if len(set(options.pilot_sizes)) < 2:
        raise ValueError("--pilot-sizes: give two sizes or more, a factor of four apart or more")
    sizes = [family.of(parameters) for parameters in sorted(set(options.pilot_sizes))]
    if len(set(sizes)) < len(sizes):
        raise ValueError("--pilot-sizes: two of them are the same model, because layers and heads are whole numbers")
    return sizes


def _parsed(parse: Callable[[str], Any], kind: str) -> Callable[[str], Any]:
    """Return `parse` with its errors as argparse reports them: the text is not of this `kind`."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not {kind}") from None

    return parsed


if __name__ == "__main__":
    sys.exit(run_command(main))
