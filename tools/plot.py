"""Plot what runs logged, or what a recipe will do.

    python -m tools.plot runs runs/a runs/b --output both.svg
    python -m tools.plot probe runs/a --metric probe_norms_grad_norm --output layers.svg
    python -m tools.plot schedule mine.toml --lr_schedule.decay_fraction=0.2 --output schedule.svg

`runs`: loss (each step faint, its running mean on top, validation as points), learning rate, batch size with the
gradient noise scale where it was measured, and gradient norm, against tokens.

`probe`: the numbers of probes as layers x tokens heat maps, one for each --metric (default: all that the run has). The
name of a metric is that of its columns in metrics.jsonl without `_layer_<number>`. Positive values that differ by more
than a factor of 5 have a logarithmic color scale.

`schedule`: learning rate and batch size; nothing is trained. The recipe and its keys are given as to the launcher
(default: the debug recipe). An adaptive batch is shown at its first size and at its largest, each with the learning
rate it gets. `./run_train.sh --dry-run` prints a table of it.

A figure needs the `plot` extra. Exit status: 0 done, 2 for a user error.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.batch import Constant
from components.metrics.jsonl import read_rows
from components.paths import is_file
from components.plotting import import_pyplot, label_tokens, save_figure
from components.run_directory import RunDirectory
from components.standard_streams import run_command
from recipes.batch_policy import build_batch_policy, build_batch_rounding
from recipes.cli import parse_recipe, reports_bad_input
from recipes.config import Config, ConfigError, load
from recipes.dry_run.schedule_preview import PlannedStep, planned_steps
from recipes.errors import UsageError, config_errors_at
from recipes.launch import resolve_world_shape
from recipes.recipe import complete_recipe, require_training

PANELS = {
    "loss": "loss, nats per token",
    "lr": "learning rate",
    "global_batch_size": "batch size, and gradient noise scale (faint), samples",
    "grad_norm": "gradient norm",
}
SMOOTHING = 50
"""The running mean of the loss is over one part in this many of the steps."""
LOG_SCALE_FROM = 5
"""The colors of a heat map are logarithmic if its values are positive and their ratio is larger than this."""
MAX_LAYER_LABELS = 12

Rows = Sequence[Mapping[str, Any]]


@reports_bad_input
def main(arguments: Sequence[str] | None = None) -> int:
    options, rest = build_parser().parse_known_args(arguments)
    if rest and options.command != "schedule":
        raise UsageError(f"unknown option {rest[0]}")
    if options.command == "runs":
        plot_runs({path.resolve().name: read_run(path) for path in options.runs}, options.output)
    elif options.command == "probe":
        plot_probes(heat_maps(options.run, options.metric), options.output)
    else:
        command = parse_recipe(rest)
        config = load(command.config, command.overrides)
        plot_schedule(schedule_curves(config, resolve_world_shape(os.environ).world_size), config, options.output)
    print(f"wrote {options.output}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("runs", help="what runs logged", allow_abbrev=False)
    runs.add_argument("runs", nargs="+", type=Path, help="run directories")
    probe = commands.add_parser("probe", help="what probes measured, layers x tokens", allow_abbrev=False)
    probe.add_argument("run", type=Path, help="run directory")
    probe.add_argument("--metric", action="append", help="such as probe_norms_grad_norm; may be repeated")
    usage = "%(prog)s [CONFIG.toml] [--section.key=value]... --output FIGURE"
    schedule = commands.add_parser("schedule", help="what a recipe will do", usage=usage, allow_abbrev=False)
    for command in (runs, probe, schedule):
        text = "file to write: .svg, .png or .pdf"
        command.add_argument("--output", type=Path, metavar="FIGURE", required=True, help=text)
    return parser


def read_run(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run. Raises ValueError if it has no finished step, or a line is not a row."""
    metrics = RunDirectory(run).metrics
    if not is_file(metrics):
        raise ValueError(f"{run} has no {metrics.name}; give a run directory, such as runs/debug")
    rows = read_rows(metrics)
    if not any("loss" in row for row in rows):
        raise ValueError(f"{metrics} has no finished step yet")
    if (wrong := next((row for row in rows if not isinstance(row.get("tokens"), int)), None)) is not None:
        raise ValueError(f"{metrics} has a row of step {wrong['step']} without tokens; remove this line")
    return rows


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window` - 1 before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def plot_runs(runs: Mapping[str, Rows], output: Path) -> None:
    """Plot one color per run, one panel per quantity. Raises ValueError without matplotlib, or for a bad file type."""
    figure, panels = import_pyplot().subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for number, (name, rows) in enumerate(runs.items()):
        color = f"C{number}"
        for axis, key in zip(panels.flat, PANELS, strict=True):
            tokens, values = _column(rows, key)
            if key == "loss":
                axis.plot(tokens, values, color=color, alpha=0.25, linewidth=0.8)
                axis.plot(tokens, running_mean(values, max(1, len(values) // SMOOTHING)), color=color, label=name)
                validated = _column(rows, "val_loss")
                axis.plot(*validated, "o", color=color, markeredgecolor="white", label=f"{name}, validation")
            else:
                axis.plot(tokens, values, color=color, linewidth=1.2)
            measured, noise_scale = _column(rows, "noise_scale")
            if key == "global_batch_size" and measured:
                axis.plot(measured, noise_scale, color=color, alpha=0.35, linewidth=0.8)
                axis.set_yscale("log")
    for axis, title in zip(panels.flat, PANELS.values(), strict=True):
        axis.set_title(title)
    panels[0, 0].legend()
    for axis in panels[1]:
        label_tokens(axis)
    save_figure(figure, output)


def _column(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Return the tokens and values of the rows that have `key`."""
    found = [row for row in rows if row.get(key) is not None]
    return [row["tokens"] for row in found], [row[key] for row in found]


@dataclass(frozen=True)
class HeatMap:
    """One number of every layer, over the steps at which it was measured."""

    metric: str
    layers: list[str]
    tokens: list[int]
    values: list[list[float]]
    """One list for each layer; NaN where a row lacks the value."""


def heat_maps(run: Path, metrics: Sequence[str] | None) -> list[HeatMap]:
    """Return the heat map of each of `metrics`, or of all metrics by layer that `run` has, in the order of its rows.

    Raises ValueError for a metric that the run does not have.
    """
    rows = read_run(run)
    columns: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name.startswith("probe_") and (found := re.fullmatch(r"(.+)_layer_([^_]+)", name)):
            columns.setdefault(found[1], []).append(found[2])
    if not columns:
        raise ValueError(f"{run} has no numbers of layers; add a probe, such as [probes.norms] of docs/probes.md")
    for metric in metrics or ():
        if metric not in columns:
            raise ValueError(f"{run} has no {metric}; its metrics by layer: {', '.join(columns)}")
    return [_heat_map(rows, metric, columns[metric]) for metric in metrics or columns]


def _heat_map(rows: Rows, metric: str, layers: list[str]) -> HeatMap:
    layers = sorted(layers, key=lambda layer: (int(layer), "") if layer.isdigit() else (sys.maxsize, layer))
    names = [f"{metric}_layer_{layer}" for layer in layers]
    measured = [row for row in rows if any(row.get(name) is not None for name in names)]
    values = [[math.nan if row.get(name) is None else row[name] for row in measured] for name in names]
    return HeatMap(metric, layers, [row["tokens"] for row in measured], values)


def plot_probes(maps: Sequence[HeatMap], output: Path) -> None:
    """Plot one panel for each heat map. Raises ValueError without matplotlib, or for a bad file type."""
    plt = import_pyplot()
    from matplotlib.colors import LogNorm

    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for axis in panels.flat[len(maps) :]:
        axis.set_visible(False)
    for axis, each in zip(panels.flat, maps, strict=False):
        finite = [value for values in each.values for value in values if math.isfinite(value)]
        spans_decades = finite and min(finite) > 0 and max(finite) > LOG_SCALE_FROM * min(finite)
        scale = LogNorm(min(finite), max(finite)) if spans_decades else None
        # a measurement is drawn from the one before it, in tokens, to its own
        mesh = axis.pcolormesh([0, *each.tokens], range(len(each.layers) + 1), each.values, norm=scale, rasterized=True)
        step = -(-len(each.layers) // MAX_LAYER_LABELS)
        axis.set_yticks([number + 0.5 for number in range(0, len(each.layers), step)], each.layers[::step])
        axis.set(title=each.metric.removeprefix("probe_"), ylabel="layer")
        axis.grid(visible=False)
        label_tokens(axis)
        figure.colorbar(mesh, ax=axis)
    save_figure(figure, output)


def schedule_curves(config: Config, world_size: int) -> dict[str, list[PlannedStep]]:
    """Return the steps of the curves to show, by label. Raises ConfigError if the recipe is not of a single run."""
    require_training(config)
    recipe = config.recipe
    if complete_recipe(recipe).dry_run is not None:
        message = f"{type(recipe).__name__} trains many runs with different schedules; give a recipe of a single run"
        raise ConfigError([config.problem("recipe", message)])
    with config_errors_at(config, "parallel"):
        rounding = build_batch_rounding(recipe, world_size)
    with config_errors_at(config, "batch"):
        policy = build_batch_policy(recipe)
        first = list(planned_steps(recipe, rounding, policy))
        if not policy.is_adaptive:
            return {recipe.run.name: first}
        curves = {f"batch at initial_size = {first[0].requested}": first}
        if policy.max_size is not None:
            largest = planned_steps(recipe, rounding, Constant(initial_size=policy.max_size))
            curves[f"batch at max_size = {policy.max_size}"] = list(largest)
        return curves


def plot_schedule(curves: Mapping[str, Sequence[PlannedStep]], config: Config, output: Path) -> None:
    """Plot learning rate above batch size. Raises ValueError without matplotlib, or for a bad file type."""
    figure, (lrs, batches) = import_pyplot().subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for label, steps in curves.items():
        last = steps[-1]
        end = last.tokens + last.batch * config.recipe.training.sequence_length
        tokens = [*(step.tokens for step in steps), end]
        lrs.plot(tokens, [step.lr for step in [*steps, last]], label=label)
        batches.plot(tokens, [step.batch for step in [*steps, last]], drawstyle="steps-post")
    lrs.set(title="learning rate", ylim=(0, None))
    batches.set(title="batch size, samples", ylim=(0, None))
    lrs.legend()
    label_tokens(batches)
    save_figure(figure, output)


if __name__ == "__main__":
    sys.exit(run_command(main))
