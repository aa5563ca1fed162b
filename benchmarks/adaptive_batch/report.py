"""The table and the pictures of the comparison."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.adaptive_batch.runs import Book, Result, Row
from benchmarks.measure import machine

BASELINES = ("constant 8", "constant 24", "constant 64")
"""Columns: optimizer steps to the loss these end with."""


def report(book: Book, tokens: int, pictures: Path) -> None:
    """Print a table for each schedule, and draw loss against steps and the batches over tokens."""
    rows = book.rows(tokens)
    for kind in ("wsd", "power"):
        kinds = ("wsd", "cosine") if kind == "wsd" else ("power",)
        here = {row: book.finals(row, tokens) for row in rows if row[1] in kinds}
        if here:
            print(f"\n{', '.join(kinds)}; {tokens:,} tokens; {machine()}\n")
            table(here, rows)
    try:
        draw({row: book.finals(row, tokens) for row in rows}, pictures)
    except ImportError:
        print('\nno pictures: they need matplotlib (pip install "powertrain[plot]")')


def table(here: dict[Row, list[Result]], rates: dict[Row, float]) -> None:
    names = " | ".join(name.removeprefix("constant ") for name in BASELINES)
    print(f"| method | rate | held-out loss | seeds | steps | mean batch | seconds | steps to the end of {names} |")
    print("|---" * (7 + len(BASELINES)) + "|")
    goals = {name: ends for (name, _), results in here.items() for ends in [end_of(results)] if name in BASELINES}
    for row, results in sorted(here.items(), key=lambda item: statistics.mean(r.val_loss for r in item[1])):
        losses = [result.val_loss for result in results]
        reached = [steps_to(results, goals.get(name)) for name in BASELINES]
        print(
            f"| {row[0]} | {rates[row]:g} | {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) "
            f"| {len(losses)} | {statistics.mean(r.steps for r in results):.0f} "
            f"| {statistics.mean(r.mean_batch for r in results):.1f} "
            f"| {statistics.mean(r.seconds for r in results):.0f} | {' | '.join(reached)} |"
        )


def end_of(results: list[Result]) -> float:
    """The smoothed training loss at the end, over the seeds."""
    return statistics.mean(result.curve[-1][2] for result in results if result.curve)


def steps_to(results: list[Result], loss: float | None) -> str:
    """Mean over the seeds; "-" where one did not come to it."""
    steps = [result.steps_to(loss) for result in results] if loss is not None else []
    reached = [each for each in steps if each is not None]
    return f"{statistics.mean(reached):.0f}" if reached and len(reached) == len(steps) else "-"


def draw(results: dict[Row, list[Result]], folder: Path) -> None:
    """adaptive_batch_loss.svg and adaptive_batch_size.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for panel, kinds in zip(panels, (("wsd", "cosine"), ("power",)), strict=True):
        for (name, kind), each in results.items():
            if kind in kinds:
                steps = statistics.mean(result.steps for result in each)
                losses = [result.val_loss for result in each]
                panel.plot([steps] * len(losses), losses, "o" if name.startswith("constant") else "^", alpha=0.6)
                panel.annotate(name, (steps, statistics.mean(losses)), fontsize=7)
        panel.set(xscale="log", xlabel="optimizer steps", ylabel="held-out loss", title=" or ".join(kinds))
    figure.tight_layout()
    figure.savefig(folder / "adaptive_batch_loss.svg")

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    for panel, kinds in zip(panels, (("wsd", "cosine"), ("power",)), strict=True):
        for (name, kind), each in results.items():
            if kind in kinds and not name.startswith("constant") and each[0].curve:
                points = each[0].curve
                panel.step([p[1] for p in points], [p[3] for p in points], where="pre", label=name)
        panel.set(yscale="log", xlabel="tokens", ylabel="batch, samples", title=" or ".join(kinds))
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "adaptive_batch_size.svg")
