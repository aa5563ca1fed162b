"""The outcome of a run: its final losses, and its curve, from the metrics that it logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from components.critical_batch import smooth_losses
from components.metrics.jsonl import read_rows
from components.run_directory import RunDirectory

EMA_FRACTION = 0.02
"""The training loss is averaged exponentially over this fraction of the tokens."""
Curve = list[tuple[int, int, float, int]]
"""Step, tokens, smoothed training loss and batch in samples, at points along a run."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    val_loss: float | None = None
    """The validation loss at the end, nats per token; None without [validation]."""
    train_loss: float | None = None
    """The smoothed training loss at the end."""
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time in steps."""
    failure: str | None = None
    """Why the run did not finish."""
    peak_lr: float = 0.0
    """The highest learning rate of the schedule at any step."""
    curve: Curve = field(default_factory=list)
    """Empty unless the curve of the run is kept."""
    average_losses: dict[str, float] = field(default_factory=dict)
    """The validation loss of each average of the weights at the end, by name."""
    noise: list[tuple[int, float]] = field(default_factory=list)
    """Tokens, and the smoothed noise scale in samples, at points along the run; empty unless its curve is kept."""

    @property
    def loss(self) -> float:
        """The validation loss, or else the training loss; infinite for a run that failed."""
        found = self.train_loss if self.val_loss is None else self.val_loss
        return math.inf if self.failure or found is None else found

    @property
    def mean_batch(self) -> float:
        """The mean batch, in samples."""
        return self.samples / self.steps

    def steps_to(self, loss: float) -> int | None:
        """Return the first step of the curve at which the smoothed training loss is at most `loss`."""
        return next((step for step, _, smoothed, _ in self.curve if smoothed <= loss), None)

    def __str__(self) -> str:
        if self.failure:
            return f"failed after {self.steps} steps: {self.failure}"
        return f"{self.loss:.4f} in {self.steps} steps, {self.seconds:.0f} s"


OUTCOMES = TypeAdapter(Outcome)
"""Validates an outcome that was read from a file."""


def measure(run: RunDirectory, failure: str | None, curve_points: int = 0) -> Outcome:
    """Return the outcome from metrics.jsonl, which a run that failed early does not have. Raises ValueError."""
    try:
        return OUTCOMES.validate_python(asdict(_outcome_of(read_rows(run.metrics), failure, curve_points)))
    except (KeyError, TypeError, ArithmeticError, ValidationError) as error:
        raise ValueError(f"{run.metrics} is damaged: {type(error).__name__} {error}") from None


def _outcome_of(rows: list[dict[str, Any]], failure: str | None, curve_points: int) -> Outcome:
    steps = [row for row in rows if "loss" in row]
    if not steps:
        return Outcome(failure=failure or "no step was finished")
    last, validated = steps[-1], [row["val_loss"] for row in rows if "val_loss" in row]
    if failure is None and None in (steps[-1]["loss"], *validated[-1:]):
        failure = "the final loss is not finite"
    losses = smoothed_losses(steps, EMA_FRACTION * last["tokens"])
    return Outcome(
        val_loss=validated[-1] if validated and failure is None else None,
        train_loss=losses[-1] if failure is None else None,
        steps=last["step"],
        samples=last["samples"],
        tokens=last["tokens"],
        seconds=sum(row["step_seconds"] for row in steps),
        failure=failure,
        peak_lr=max(row["lr"] for row in steps),
        curve=sample_curve(steps, losses, curve_points),
        average_losses=_average_losses(rows),
        noise=sample_noise(steps, curve_points),
    )


def _average_losses(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last validation loss of each average that has a finite one, by name."""
    return {
        key.removeprefix("val_loss_average_"): value
        for row in rows
        for key, value in row.items()
        if key.startswith("val_loss_average_") and value is not None
    }


def smoothed_losses(rows: Sequence[Mapping[str, Any]], window: float) -> list[float]:
    """Return the training loss after each step, averaged exponentially over `window` tokens for any batch size."""
    length = rows[-1]["tokens"] // rows[-1]["samples"]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    return smooth_losses(losses, [row["global_batch_size"] * length for row in rows], window)


def sample_curve(rows: Sequence[Mapping[str, Any]], losses: Sequence[float], points: int) -> Curve:
    """Return `Outcome.curve`: the last step and those before it at equal distances, at most `points` points."""
    sampled = ((rows[at], losses[at]) for at in _kept(len(rows), points))
    return [(row["step"], row["tokens"], round(loss, 5), row["global_batch_size"]) for row, loss in sampled]


def sample_noise(rows: Sequence[Mapping[str, Any]], points: int) -> list[tuple[int, float]]:
    """Return `Outcome.noise`: of the steps with a noise scale, the last and others at equal distances."""
    measured = [(row["tokens"], round(scale, 3)) for row in rows if (scale := row.get("noise_scale")) is not None]
    return [measured[at] for at in _kept(len(measured), points)]


def _kept(length: int, points: int) -> range:
    """Return at most `points` indices at equal distances, the last one included."""
    if not points or not length:
        return range(0)
    every = math.ceil(length / points)
    return range((length - 1) % every, length, every)
