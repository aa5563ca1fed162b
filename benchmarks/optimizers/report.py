"""The table and the figure of the comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.optimizers.runs import BASELINES, SHORTER, Setting, Tuning
from components.plotting import import_pyplot, save_figure

TOLERANCE = 0.01
"""The largest batch that costs less than this fraction of the loss at the best batch is reported."""


def report_lines(tuning: Tuning, settings: Sequence[Setting]) -> Iterator[str]:
    """Yield the table, one row for each setting with all its seeds, and the largest batch of each optimizer."""
    columns = "parameters", "batch", "optimizer", "learning rate", "loss", "against AdamW", "steps to AdamW's loss"
    yield f"| {' | '.join(columns)} | ms per step |"
    yield "|---" * (len(columns) + 1) + "|"
    for setting in settings:
        outcomes, lr = tuning.outcomes(setting), tuning.best_lr(setting)
        if not outcomes or lr is None:
            continue
        loss = _mean_loss(tuning, setting)
        spread = statistics.stdev(each.loss for each in outcomes) if len(outcomes) > 1 else math.nan
        adamw = _mean_loss(tuning, setting._replace(optimizer=BASELINES.get(setting.optimizer, "AdamW")))
        needed = fraction_to(tuning, setting, adamw)
        milliseconds = 1e3 * statistics.median(each.seconds / each.steps for each in outcomes)
        cells = (
            setting.size,
            setting.batch,
            setting.optimizer,
            f"{lr:g}",
            f"{loss:.4f} ± {spread:.4f} ({len(outcomes)})",
            f"{loss / adamw - 1:+.1%}",
            needed,
            f"{milliseconds:.0f}",
        )
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    for size, optimizer in dict.fromkeys((setting.size, setting.optimizer) for setting in settings):
        losses = {s.batch: _mean_loss(tuning, s) for s in settings if (s.size, s.optimizer) == (size, optimizer)}
        done = {batch: loss for batch, loss in losses.items() if math.isfinite(loss)}
        if len(done) > 1:
            largest = max(batch for batch, loss in done.items() if loss <= (1 + TOLERANCE) * min(done.values()))
            tried = ", ".join(map(str, sorted(done)))
            yield f"{size}, {optimizer}: of {tried}, {largest} is the largest batch within {TOLERANCE:.0%} of the best"


def fraction_to(tuning: Tuning, setting: Setting, loss: float) -> str:
    """Return the fraction of AdamW's steps after which a whole run, decay included, ends at `loss`."""
    if setting.optimizer not in BASELINES:
        return "100 %" if setting.optimizer == "AdamW" else ""
    points = [(fraction, _mean_loss(tuning, setting, fraction)) for fraction in (*SHORTER, 1.0)]
    points = [point for point in points if math.isfinite(point[1])]
    if not points or not math.isfinite(loss) or points[-1][1] > loss:
        return "more than 100 %" if points and math.isfinite(loss) else "-"
    if points[0][1] <= loss:
        return f"less than {points[0][0]:.0%}"
    for (before, higher), (after, lower) in pairwise(points):
        if lower <= loss < higher:
            return f"{before + (after - before) * (higher - loss) / (higher - lower):.0%}"
    return "-"


def plot_losses(tuning: Tuning, settings: Sequence[Setting], output: Path) -> None:
    """Plot loss against learning rate, a panel for each size and batch. Raises ValueError without matplotlib."""
    panels = list(dict.fromkeys((setting.size, setting.batch) for setting in settings if tuning.losses(setting)))
    if not panels:
        return
    options = {"squeeze": False, "layout": "constrained"}
    figure, axes = import_pyplot().subplots(1, len(panels), figsize=(4 * len(panels), 3.5), **options)
    for axis, (size, batch) in zip(axes.flat, panels, strict=True):
        for setting in settings:
            if (setting.size, setting.batch) == (size, batch) and (losses := tuning.losses(setting)):
                finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
                axis.plot(list(finite), list(finite.values()), "o-", label=setting.optimizer)
        axis.set_xscale("log")
        axis.set_title(f"{size} parameters, batch {batch}")
        axis.set_xlabel("learning rate")
        axis.set_ylabel("validation loss")
    axes[0, 0].legend()
    save_figure(figure, output)


def _mean_loss(tuning: Tuning, setting: Setting, fraction: float = 1.0) -> float:
    outcomes = tuning.outcomes(setting, fraction)
    return statistics.fmean(each.loss for each in outcomes) if outcomes else math.nan
