"""A preview of a run's schedule: batch size and learning rate of every step, simulated without training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from components.batch import BatchPolicy, BatchRounding
from components.clock import TrainingClock
from recipes.batch_policy import build_batch_policy
from recipes.interfaces import complete_schedule

MAX_MILESTONES = 60


class PlannedStep(NamedTuple):
    """One optimizer step, before it is taken."""

    number: int
    """The number of the step, from 1."""
    tokens: int
    """Tokens trained before this step."""
    requested: int
    """Samples that the policy requested."""
    batch: int
    """Samples of the step."""
    micro_batches: int
    """Micro-batches of each rank."""
    lr: float


class Milestone(NamedTuple):
    """A step to show, and the reasons for showing it."""

    reasons: list[str]
    step: PlannedStep


@dataclass
class SchedulePreview:
    """The steps of a run, summarized. An adaptive batch policy is given no measurement, so it keeps its first size."""

    milestones: list[Milestone] = field(default_factory=list)
    num_steps: int = 0
    samples: int = 0
    tokens: int = 0
    largest_batch: int = 0
    """The largest batch, in samples."""
    rounded_batches: dict[int, int] = field(default_factory=dict)
    """Requested batch -> the multiple it is rounded up to, where the two differ; in samples."""
    warmup_steps: int = 0
    """Steps that start within the warm-up."""
    zero_lr_from: int | None = None
    """Tokens from which the learning rate is zero until the end of the run."""
    invalid_lr: tuple[int, float] | None = None
    """The first step whose learning rate is negative or not finite, and that learning rate."""

    @property
    def mean_batch(self) -> float:
        return self.samples / self.num_steps


def planned_steps(recipe: Any, rounding: BatchRounding, policy: BatchPolicy | None = None) -> Iterator[PlannedStep]:
    """Yield every step of a run whose batch policy, by default that of [batch], is given no measurement.

    Raises ValueError if the policy requests an invalid batch, or does not fit the learning-rate schedule.
    """
    training = recipe.training
    policy = policy or build_batch_policy(recipe)
    clock = TrainingClock(training.total_tokens, training.sequence_length)
    while not clock.done:
        batch = rounding.round_up(policy.next_batch_size(clock))
        lr = recipe.lr_schedule.lr(clock.tokens, batch.samples * training.sequence_length, clock.total_tokens)
        yield PlannedStep(clock.step + 1, clock.tokens, batch.requested, batch.samples, batch.micro_batches, lr)
        clock.advance(batch.samples)


def simulate_schedule(recipe: Any, rounding: BatchRounding) -> SchedulePreview:
    """Return the preview of `planned_steps(recipe, rounding)`, and raise what that raises."""
    warmup = complete_schedule(recipe.lr_schedule).warmup_tokens
    preview, milestones = SchedulePreview(), dict[int, Milestone]()
    last: PlannedStep | None = None
    highest: PlannedStep | None = None
    for step in planned_steps(recipe, rounding):
        reasons = list(_reasons_to_show(step, last, warmup, recipe.training))
        if reasons and len(milestones) < MAX_MILESTONES:
            milestones[step.number] = Milestone(reasons, step)
        last = step
        if highest is None or step.lr > highest.lr:
            highest = step
        if step.batch != step.requested:
            preview.rounded_batches[step.requested] = step.batch
        preview.warmup_steps += step.tokens < warmup
        if step.lr != 0:
            preview.zero_lr_from = None
        elif preview.zero_lr_from is None:
            preview.zero_lr_from = step.tokens
        if preview.invalid_lr is None and not (math.isfinite(step.lr) and step.lr >= 0):
            preview.invalid_lr = (step.number, step.lr)
        preview.samples += step.batch
        preview.largest_batch = max(preview.largest_batch, step.batch)
    assert last is not None and highest is not None
    for step, reason in ((highest, "highest lr"), (last, "last")):
        milestones.setdefault(step.number, Milestone([], step)).reasons.append(reason)
    preview.milestones = [milestones[number] for number in sorted(milestones)]
    preview.num_steps, preview.tokens = last.number, preview.samples * recipe.training.sequence_length
    return preview


def _reasons_to_show(step: PlannedStep, last: PlannedStep | None, warmup: int, training: Any) -> Iterator[str]:
    """Yield why to show `step`, given the step before it and the tokens of the warm-up."""
    if last is None:
        yield "first"
    elif step.batch != last.batch:
        yield "batch"
    if step.tokens < warmup <= step.tokens + step.batch * training.sequence_length:
        yield "warmed up"
    tenths = 10 * step.tokens // training.total_tokens
    if last is not None and tenths > 10 * last.tokens // training.total_tokens:
        yield f"{tenths}0 %"
