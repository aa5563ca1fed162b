"""Draw what a recipe will do: learning rate and batch over tokens. Nothing is trained.

    python -m tools.plot_schedule mine.toml --lr_schedule.decay_fraction=0.2 --output schedule.svg
    python -m tools.plot_schedule runs/a/config.toml --metrics runs/a --output schedule.png

A recipe and its keys are given as to the launcher; without a recipe it is the debug one. A batch that follows the
gradient is shown as it starts and as it would be at its maximum, each with the rate it gets. With --metrics the batches
are those that a run has taken, under the schedule of the recipe. Without --output there is only the table.
A picture needs the `plot` extra. Exit status: 0 done, 2 for what the user can put right.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.batch import BatchLayout, Constant
from components.standard_streams import run_command
from recipes.batch_policy import build_batch_policy
from recipes.cli import UsageError, parse_recipe, resolve_world_shape
from recipes.config import Config, ConfigError, load
from recipes.course import Step, steps, summarise
from recipes.errors import blame
from recipes.recipe import complete_recipe
from tools.pictures import count_tokens_on, pyplot, write
from tools.plot_runs import read_run

POINTS = 2000
"""Of a curve, at most, and besides every change of the batch: a long run has more steps than a picture has dots."""


@dataclass(frozen=True)
class Curve:
    """A run, step by step."""

    label: str
    steps: list[Step]

    def points(self, sequence_length: int) -> tuple[list[int], list[float], list[int]]:
        """Tokens, rate and batch at the start of some steps, and again at the end of the last."""
        every = max(1, len(self.steps) // POINTS)
        last = self.steps[-1]
        shown = [
            step
            for i, step in enumerate(self.steps)
            if i % every == 0 or step is last or step.batch != self.steps[i - 1].batch
        ]
        tokens = [step.tokens for step in shown] + [last.tokens + last.batch * sequence_length]
        return tokens, [step.lr for step in [*shown, last]], [step.batch for step in [*shown, last]]


def curves(config: Config, world_size: int, metrics: Path | None) -> list[Curve]:
    """Raises ConfigError where the recipe has no such run, and ValueError where `metrics` are not of one."""
    recipe = config.recipe
    if complete_recipe(recipe).dry_run is not None:
        message = f"{type(recipe).__name__} is many runs, each at a rate and a batch of its own; draw the recipe of one"
        raise ConfigError([config.problem("recipe", message)])
    with blame(config, "parallel"):
        sizes = recipe.parallel.sizes(world_size)
    layout = BatchLayout(recipe.training.micro_batch_size, sizes.dp_size)
    if metrics is not None:
        return [Curve(f"the batches of {metrics}", taken(recipe, metrics))]
    with blame(config, "batch"):
        policy = build_batch_policy(recipe)
        first = list(steps(recipe, layout, policy))
        if not policy.is_adaptive:
            return [Curve(recipe.run.name, first)]
        shown = [Curve(f"batch at initial = {first[0].requested}", first)]
        if policy.max_size is not None:
            largest = list(steps(recipe, layout, Constant(initial=policy.max_size)))
            shown.append(Curve(f"batch at maximum = {policy.max_size}", largest))
        return shown


def taken(recipe: Any, run: Path) -> list[Step]:
    """The steps of a run, at the rates of this recipe's schedule. `run`: its directory, or its metrics.jsonl."""
    length, total = recipe.training.sequence_length, recipe.training.total_tokens
    found = []
    for row in read_run(run.parent if run.is_file() else run):
        if "loss" not in row:
            continue
        batch = row["global_batch_size"]
        if row["tokens"] != row["samples"] * length:
            raise ValueError(f"{run} has samples of {row['tokens'] // row['samples']} tokens, the recipe of {length}")
        tokens = row["tokens"] - batch * length
        lr = recipe.lr_schedule.lr(tokens, batch * length, total)
        found.append(Step(row["step"], tokens, row["requested_batch_size"], batch, row["micro_batches"], lr))
    return found


def plot(shown: Sequence[Curve], sequence_length: int, output: Path) -> None:
    """Rate above, batch below. Raises ValueError without matplotlib, or for an unknown kind of file."""
    figure, (rates, batches) = pyplot().subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for curve in shown:
        tokens, lr, batch = curve.points(sequence_length)
        rates.plot(tokens, lr, label=curve.label)
        batches.plot(tokens, batch, drawstyle="steps-post")
    for axis, title in ((rates, "learning rate"), (batches, "batch, samples")):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    rates.legend(frameon=False)
    count_tokens_on(batches)
    write(figure, output)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot_schedule",
        usage="%(prog)s [CONFIG.toml] [--section.key=value]... [--metrics RUN] [--output PICTURE]",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--metrics", type=Path, metavar="RUN", help="take the batches of this run directory")
    parser.add_argument("--output", type=Path, metavar="PICTURE", help="the picture to write: .svg, .png or .pdf")
    options, rest = parser.parse_known_args(arguments)
    try:
        command = parse_recipe(rest)
        config = load(command.config, command.overrides)
        shown = curves(config, resolve_world_shape(os.environ).world_size, options.metrics)
        length = config.recipe.training.sequence_length
        for curve in shown:
            print("\n".join([curve.label, *summarise(curve.steps, config.recipe).lines(length), ""]))
        if options.output is not None:
            plot(shown, length, options.output)
            print(f"wrote {options.output}")
    except (ConfigError, UsageError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
