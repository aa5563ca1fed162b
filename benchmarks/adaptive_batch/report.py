"""The tables and the figures of the comparison."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.adaptive_batch.runs import Row
from benchmarks.measure import machine
from components.plotting import import_pyplot, label_tokens, save_figure
from tools.sweep.runner import Outcome

BASELINES = ("constant 8", "constant 24", "constant 64")
"""Columns: optimizer steps to the loss these end with."""
PANELS = (("wsd", "cosine"), ("power",))
"""Schedules that are set side by side."""


COLORS = [f"C{number}" for number in range(10) if number != 7]
"""Of the methods: all of the default cycle but its grey, which is for constant batches."""

Rows = dict[Row, tuple[float, list[Outcome]]]
"""The rate of each row, and its final runs by seed."""


def report(rows: Rows, tokens: int, pictures: Path) -> None:
    """Print a table for each schedule, and draw loss against steps and the batches over tokens."""
    for kinds in PANELS:
        here = {row: found for row, found in rows.items() if row[1] in kinds}
        if here:
            print(f"\n{', '.join(kinds)}; {tokens:,} tokens; {machine()}\n")
            table(here)
    if rows:
        plot_losses(rows, pictures / "adaptive_batch_loss.svg")
        plot_sizes(rows, pictures / "adaptive_batch_size.svg")


def table(here: Rows) -> None:
    names = " | ".join(name.removeprefix("constant ") for name in BASELINES)
    columns = "method | rate | held-out loss | training loss at the end | seeds | steps | mean batch | seconds"
    print(f"| {columns} | steps to the end of {names} |")
    print("|---" * (columns.count("|") + 1 + len(BASELINES)) + "|")
    baselines = {name: at_the_end(results) for (name, _), (_, results) in here.items() if name in BASELINES}
    goals = {name: statistics.mean(losses) for name, losses in baselines.items() if losses}
    for row, (rate, results) in sorted(here.items(), key=lambda item: mean_loss(item[1][1])):
        reached = [steps_to(results, goals.get(name)) for name in BASELINES]
        print(
            f"| {row[0]} | {rate:g} | {over_seeds([r.loss for r in results])} "
            f"| {over_seeds(at_the_end(results))} "
            f"| {len(results)} | {statistics.mean(r.steps for r in results):.0f} "
            f"| {statistics.mean(r.mean_batch for r in results):.1f} "
            f"| {statistics.mean(r.seconds for r in results):.0f} | {' | '.join(reached)} |"
        )


def over_seeds(losses: list[float]) -> str:
    """Mean, lowest and highest; "-" if every run failed."""
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" if losses else "-"


def mean_loss(results: list[Outcome]) -> float:
    return statistics.mean(result.loss for result in results)


def at_the_end(results: list[Outcome]) -> list[float]:
    """The smoothed training loss that each seed ended with."""
    return [result.train_loss for result in results if result.train_loss is not None]


def steps_to(results: list[Outcome], loss: float | None) -> str:
    """Mean over the seeds; "-" where one did not come to it."""
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
