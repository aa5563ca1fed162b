"""A run played through without training: every step as batch policy and schedule would have it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from components.batch.layout import BatchLayout
from components.clock import Clock
from recipes.contracts import FollowsSchedule

MOST_LANDMARKS = 60


@dataclass(frozen=True)
class Landmark:
    """A step worth showing."""

    why: str
    step: int
    tokens: int
    """Trained before this step."""
    batch: int
    micro_batches: int
    lr: float


@dataclass
class Course:
    """A whole run, the policy told nothing of any gradient: one that measures stays where it starts."""

    landmarks: list[Landmark] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    rounded: dict[int, int] = field(default_factory=dict)
    """Requested batch -> the batch the layout makes of it, where the two differ; in samples."""
    warmup_steps: int = 0
    """Steps that start or end within the warm-up."""
    zero_from: int | None = None
    """Tokens from which on the rate is zero until the end."""
    bad_rate: tuple[int, float] | None = None
    """The first step whose rate is negative or not finite, and that rate."""

    @property
    def mean_batch(self) -> float:
        return self.samples / self.steps


def follow_schedule(recipe: Any) -> None:
    """Show the schedule to a batch policy that depends on it. Raises ValueError where the two do not go together."""
    if isinstance(recipe.batch, FollowsSchedule):
        training = recipe.training
        recipe.batch.follow(
            recipe.lr_schedule, sequence_length=training.sequence_length, total_tokens=training.total_tokens
        )


def play(recipe: Any, layout: BatchLayout) -> Course:
    """Raises ValueError where the policy asks for a batch that is none, or does not go with the schedule."""
    training, schedule = recipe.training, recipe.lr_schedule
    follow_schedule(recipe)
    clock = Clock(training.total_tokens, training.sequence_length)
    warmup = getattr(schedule, "warmup_tokens", 0)
    course = Course()
    last, highest, tenths = None, None, 0
    while not clock.done:
        batch = layout.fit(recipe.batch.samples(clock))
        tokens, step_tokens = clock.tokens, batch.samples * training.sequence_length
        lr = schedule.lr(tokens, step_tokens, clock.total_tokens)
        why = []
        if last is None:
            why.append("first")
        elif batch.samples != last.batch:
            why.append("batch")
        if tokens < warmup <= tokens + step_tokens:
            why.append("warmed up")
        if tokens * 10 // clock.total_tokens > tenths:
            tenths = tokens * 10 // clock.total_tokens
            why.append(f"{tenths}0 %")
        last = Landmark(", ".join(why), clock.step + 1, tokens, batch.samples, batch.micro_batches, lr)
        if why and len(course.landmarks) < MOST_LANDMARKS:
            course.landmarks.append(last)
        if highest is None or lr > highest.lr:
            highest = last
        if batch.samples != batch.requested:
            course.rounded[batch.requested] = batch.samples
        course.warmup_steps += tokens < warmup
        course.zero_from = (tokens if course.zero_from is None else course.zero_from) if lr == 0 else None
        if course.bad_rate is None and not (math.isfinite(lr) and lr >= 0):
            course.bad_rate = (last.step, lr)
        clock.advance(batch.samples)
    assert last is not None and highest is not None
    course.landmarks = _with(_with(course.landmarks, highest, "highest rate"), last, "last")
    course.steps, course.samples, course.tokens = clock.step, clock.samples, clock.tokens
    return course


def _with(landmarks: list[Landmark], extra: Landmark, why: str) -> list[Landmark]:
    """`landmarks` in order of steps, `extra` among them, with one more reason."""
    by_step = {mark.step: mark for mark in [extra, *landmarks]}
    mark = by_step[extra.step]
    by_step[extra.step] = replace(mark, why=f"{mark.why}, {why}" if mark.why else why)
    return [by_step[step] for step in sorted(by_step)]
