"""The result of a critical-batch measurement: a table, JSON values and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from components.critical_batch import is_within_tolerance, largest_factor, smooth_losses
from components.plotting import import_pyplot, label_tokens, save_figure
from components.units import format_count

NOISE_SCALES = {"noise_scale": "", "noise_scale_adam": ", in the norm of Adam"}
"""Metric -> how the report names it."""


@dataclass(frozen=True)
class Branch:
    """The results of one branch."""

    multiplier: int
    batch: int
    """Samples per step."""
    batch_tokens: int
    lr: float
    steps: int
    """The planned number of steps."""
    losses: tuple[float, ...]
    """The loss of each step that was taken; nan if not finite. Shorter than `steps` if the branch ended early."""
    val_loss: float | None
    """The final validation loss; None without validation data."""
    noise_scales: Mapping[str, tuple[float, ...]]
    """The gradient noise scales of the steps at which they were measured, in samples, by the name of the metric."""


@dataclass(frozen=True)
class Report:
    """Compares all branches."""

    branches: tuple[Branch, ...]
    smoothing_tokens: int
    tolerance: float
    sequence_length: int

    @cached_property
    def curves(self) -> list[list[float]]:
        """The smoothed loss of each branch after each of its steps."""
        return [
            smooth_losses(branch.losses, [branch.batch_tokens] * len(branch.losses), self.smoothing_tokens)
            for branch in self.branches
        ]

    @cached_property
    def losses(self) -> list[float]:
        """The final smoothed loss of each branch; nan if it ended early or skipped a step."""
        return [
            curve[-1] if len(curve) == branch.steps and all(map(math.isfinite, branch.losses)) else math.nan
            for branch, curve in zip(self.branches, self.curves, strict=True)
        ]

    @property
    def multiplier(self) -> int:
        """k*: the largest multiplier within the tolerance."""
        return largest_factor([branch.multiplier for branch in self.branches], self.losses, self.tolerance)

    @property
    def batch(self) -> int:
        """The critical batch, in samples."""
        return self.multiplier * self.branches[0].batch

    @property
    def is_lower_bound(self) -> bool:
        """Whether no branch was too large, so that the critical batch may be larger than all of them."""
        return self.multiplier == self.branches[-1].multiplier

    @property
    def _too_large(self) -> int:
        """The multiplier after k*, if there is one."""
        return min(branch.multiplier for branch in self.branches if branch.multiplier > self.multiplier)

    @property
    def noise_scales(self) -> dict[str, float | None]:
        """The gradient noise scale along the first branch, in samples, by the name of the metric: in each norm that was
        measured, and None for a Euclidean one that was not."""
        return {
            name: median(values) if values else None
            for name, values in self.branches[0].noise_scales.items()
            if values or name == "noise_scale"
        }

    def summary(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        rows = [
            {
                "k": branch.multiplier,
                "batch": branch.batch,
                "lr": branch.lr,
                "steps": branch.steps,
                "smoothed_loss": loss if math.isfinite(loss) else None,
                "difference": loss - self.losses[0] if math.isfinite(loss) else None,
                "within_tolerance": is_within_tolerance(loss, self.losses[0], self.tolerance),
                "val_loss": branch.val_loss,
            }
            for branch, loss in zip(self.branches, self.losses, strict=True)
        ]
        return {
            "smoothing_tokens": self.smoothing_tokens,
            "tolerance": self.tolerance,
            "branches": rows,
            "k_star": self.multiplier,
            "critical_batch": self.batch,
            "critical_batch_tokens": self.batch * self.sequence_length,
            "is_lower_bound": self.is_lower_bound,
            **self.noise_scales,
        }

    def lines(self) -> Iterator[str]:
        yield f"{'k':>6} {'batch':>8} {'lr':>10} {'steps':>8} {'loss':>9} {'difference':>11} {'validation':>11}  within"
        for row in self.summary()["branches"]:
            loss = "not finite" if row["smoothed_loss"] is None else f"{row['smoothed_loss']:.4f}"
            difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
            held_out = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
            yield (
                f"{row['k']:>6} {row['batch']:>8} {row['lr']:>10.3g} {row['steps']:>8} {loss:>9} {difference:>11} "
                f"{held_out:>11}  {'yes' if row['within_tolerance'] else 'no'}"
            )
        tokens = format_count(self.batch * self.sequence_length)
        least, beyond = "at least ", "no branch was too large"
        if not self.is_lower_bound:
            least, beyond = "", f"k = {self._too_large} is too large"
        yield f"k* = {self.multiplier}: the critical batch is {least}{self.batch} samples, {tokens} tokens; {beyond}"
        for name, scale in self.noise_scales.items():
            norm = NOISE_SCALES[name]
            noise = "not measured" if scale is None else f"{scale:.4g} samples"
            yield f"gradient noise scale of the branch k = 1{norm}: {noise}"


def draw_report(report: Report, output: Path) -> None:
    """Plot the smoothed losses (left) and their last values (right). Raises ValueError without matplotlib."""
    figure, (over_tokens, over_batch) = import_pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for branch, curve in zip(report.branches, report.curves, strict=True):
        tokens = [branch.batch_tokens * (step + 1) for step in range(len(curve))]
        over_tokens.plot(tokens, curve, label=f"k = {branch.multiplier}")
    over_tokens.set_ylabel("smoothed loss, nats per token")
    label_tokens(over_tokens, "tokens since the checkpoint")
    over_tokens.legend()

    first = report.losses[0]
    batches = [branch.batch for branch in report.branches]
    over_batch.plot(batches, [loss - first for loss in report.losses], "o-")
    over_batch.axhline(report.tolerance, color="grey", linestyle="--", label="tolerance")
    over_batch.axvline(report.batch, color="C1", label="critical batch" + (" or more" if report.is_lower_bound else ""))
    for number, (name, scale) in enumerate(report.noise_scales.items(), 2):
        if scale is not None:
            over_batch.axvline(scale, color=f"C{number}", label=f"gradient noise scale{NOISE_SCALES[name]}")
    over_batch.set_xscale("log", base=2)
    over_batch.set(xlabel="batch, samples", ylabel="difference from k = 1")
    over_batch.legend()
    save_figure(figure, output)
