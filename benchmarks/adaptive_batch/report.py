"""The tables and the figures of the comparison."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.adaptive_batch.methods import DECAY_FRACTION
from benchmarks.adaptive_batch.runs import Row
from benchmarks.shared import machine
from components.plotting import import_pyplot, label_tokens, save_figure
from tools.sweep.outcome import Outcome

BASELINES = ("constant 8", "constant 24", "constant 64")
"""Methods whose final loss is the goal of a column of steps."""
PANELS = (("wsd", "cosine"), ("power",))
"""Schedules that share a table and a panel."""

COLORS = [f"C{number}" for number in range(10) if number != 7]
"""Colors of the methods: the default cycle without grey, which is for constant batches."""

Rows = dict[Row, tuple[float, list[Outcome]]]
"""The learning rate of each row, and its final runs by seed."""


def write_report(rows: Rows, tokens: int, figures: Path) -> None:
    """Print the tables, and plot loss against steps and batches over tokens."""
    for kinds in PANELS:
        in_panel = {row: found for row, found in rows.items() if row[1] in kinds}
        if in_panel:
            print(f"\n{', '.join(kinds)}; {tokens:,} tokens; {machine()}\n")
            print_table(in_panel)
    if rows:
        plot_losses(rows, figures / "adaptive_batch_loss.svg")
        plot_sizes(rows, figures / "adaptive_batch_size.svg")


def print_table(in_panel: Rows) -> None:
    names = " | ".join(name.removeprefix("constant ") for name in BASELINES)
    columns = (
        "method | learning rate | validation loss | training loss before the decay | training loss at the end | seeds "
        "| steps | mean batch | seconds"
    )
    print(f"| {columns} | steps to the end of {names} |")
    print("|---" * (columns.count("|") + 1 + len(BASELINES)) + "|")
    baselines = {name: final_train_losses(results) for (name, _), (_, results) in in_panel.items() if name in BASELINES}
    goals = {name: statistics.mean(losses) for name, losses in baselines.items() if losses}
    for row, (lr, results) in sorted(in_panel.items(), key=lambda item: mean_loss(item[1][1])):
        reached = [format_steps_to(results, goals.get(name)) for name in BASELINES]
        print(
            f"| {row[0]} | {lr:g} | {format_losses([r.loss for r in results])} "
            f"| {'-' if row[1] == 'cosine' else format_losses(losses_before_decay(results))} "
            f"| {format_losses(final_train_losses(results))} "
            f"| {len(results)} | {statistics.mean(r.steps for r in results):.0f} "
            f"| {statistics.mean(r.mean_batch for r in results):.1f} "
            f"| {statistics.mean(r.seconds for r in results):.0f} | {' | '.join(reached)} |"
        )


def format_losses(losses: list[float]) -> str:
    """Return mean, lowest and highest as text; "-" if every run failed."""
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" if losses else "-"


def mean_loss(results: list[Outcome]) -> float:
    return statistics.mean(result.loss for result in results)


def final_train_losses(results: list[Outcome]) -> list[float]:
    """Return the final smoothed training loss of each seed."""
    return [result.train_loss for result in results if result.train_loss is not None]


def losses_before_decay(results: list[Outcome]) -> list[float]:
    """Return the smoothed training loss of each seed at the last point before the learning rate decays."""
    before = [
        [loss for _, tokens, loss, _ in result.curve if tokens <= (1 - DECAY_FRACTION) * result.tokens]
        for result in results
    ]
    return [losses[-1] for losses in before if losses]


def format_steps_to(results: list[Outcome], loss: float | None) -> str:
    """Return the mean steps to a loss over the seeds; "-" if one did not reach it."""
    steps = [result.steps_to(loss) for result in results] if loss is not None else []
    reached = [each for each in steps if each is not None]
    return f"{statistics.mean(reached):.0f}" if reached and len(reached) == len(steps) else "-"


def plot_losses(rows: Rows, output: Path) -> None:
    """Plot the validation loss of each method (mean, and range over seeds) against its optimizer steps."""
    figure, panels = import_pyplot().subplots(1, 2, figsize=(13, 5), layout="constrained")
    styles = method_styles(rows)
    for panel, kinds in zip(panels, PANELS, strict=True):
        for (name, kind), (_, results) in rows.items():
            losses = [result.loss for result in results if math.isfinite(result.loss)]
            if kind in kinds and losses:
                mean, steps = statistics.mean(losses), statistics.mean(result.steps for result in results)
                spread = [[mean - min(losses)], [max(losses) - mean]]
                panel.errorbar(steps, mean, yerr=spread, capsize=3, markersize=8, alpha=0.9, **styles[name])
        panel.set(xscale="log", xlabel="optimizer steps", title=" or ".join(kinds))
        panel.set_xticks([500, 1000, 2000, 4000], labels=["500", "1000", "2000", "4000"])
        panel.set_xticks([], minor=True)
    panels[0].set_ylabel("validation loss: mean, lowest and highest seed")
    _add_legend(figure, panels)
    save_figure(figure, output)


def plot_sizes(rows: Rows, output: Path) -> None:
    """Plot the batch size over tokens, of the first seed of every method that is not constant."""
    figure, panels = import_pyplot().subplots(1, 2, figsize=(13, 4.5), sharey=True, layout="constrained")
    styles = method_styles(rows)
    for panel, kinds in zip(panels, PANELS, strict=True):
        for (name, kind), (_, results) in rows.items():
            if kind in kinds and not name.startswith("constant"):
                points = results[0].curve
                style = {**styles[name], "marker": None, "linestyle": "-"}
                panel.step([p[1] for p in points], [p[3] for p in points], where="pre", **style)
        panel.set(yscale="log", title=" or ".join(kinds))
        panel.set_yticks([8, 16, 32, 64, 128], labels=["8", "16", "32", "64", "128"])
        panel.set_yticks([], minor=True)
        label_tokens(panel)
    panels[0].set_ylabel("batch size, samples")
    _add_legend(figure, panels)
    save_figure(figure, output)


def method_styles(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return a color and marker for each method, equal in all panels: grey for constant batches, in order of size."""
    names = sorted({name for name, _ in rows}, key=lambda name: (name.startswith("constant"), name))
    constants = sorted((name for name in names if name.startswith("constant")), key=lambda name: int(name.split()[1]))
    policies = [name for name in names if name not in constants]
    styles: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(policies):
        styles[name] = {"color": COLORS[number % len(COLORS)], "marker": "^vDs<>"[number % 6]}
    for number, name in enumerate(constants):
        grey = 0.15 + 0.6 * number / max(1, len(constants) - 1)
        styles[name] = {"color": str(grey), "marker": "oPX*hp"[number % 6]}
    return {name: {**style, "label": name, "linestyle": "none"} for name, style in styles.items()}


def _add_legend(figure: Any, panels: Any) -> None:
    """Add one legend of all panels, outside of them."""
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if handles:
        labels = sorted(handles, key=lambda name: (name.startswith("constant"), len(name), name))
        figure.legend([handles[label] for label in labels], labels, loc="outside right center", fontsize=9)
