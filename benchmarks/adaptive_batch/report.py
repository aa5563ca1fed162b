"""The table and the pictures of the comparison."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.adaptive_batch.runs import Row
from benchmarks.measure import machine
from components.plotting import import_pyplot, save_figure
from tools.sweep.runner import Outcome

BASELINES = ("constant 8", "constant 24", "constant 64")
"""Columns: optimizer steps to the loss these end with."""
PANELS = (("wsd", "cosine"), ("power",))
"""Schedules that are set side by side."""


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
        draw_losses(rows, pictures / "adaptive_batch_loss.svg")
        draw_sizes(rows, pictures / "adaptive_batch_size.svg")


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


def draw_losses(rows: Rows, picture: Path) -> None:
    """Held-out loss against optimizer steps, every seed."""
    figure, panels = import_pyplot().subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for panel, kinds in zip(panels, PANELS, strict=True):
        for (name, kind), (_, results) in rows.items():
            if kind in kinds:
                steps = statistics.mean(result.steps for result in results)
                losses = [result.loss for result in results]
                panel.plot([steps] * len(losses), losses, "o" if name.startswith("constant") else "^", alpha=0.6)
                panel.annotate(name, (steps, mean_loss(results)), fontsize=7)
        panel.set(xscale="log", xlabel="optimizer steps", ylabel="held-out loss", title=" or ".join(kinds))
    save_figure(figure, picture)


def draw_sizes(rows: Rows, picture: Path) -> None:
    """The batch over tokens, of the first seed."""
    figure, panels = import_pyplot().subplots(1, 2, figsize=(13, 5), sharey=True)
    for panel, kinds in zip(panels, PANELS, strict=True):
        for (name, kind), (_, results) in rows.items():
            if kind in kinds and not name.startswith("constant"):
                points = results[0].curve
                panel.step([p[1] for p in points], [p[3] for p in points], where="pre", label=name)
        panel.set(yscale="log", xlabel="tokens", ylabel="batch, samples", title=" or ".join(kinds))
        if panel.lines:
            panel.legend(fontsize=7)
    save_figure(figure, picture)
