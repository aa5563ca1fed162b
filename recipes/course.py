"""A run played through without training: every step as batch policy and schedule would have it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from components.batch import BatchLayout, BatchPolicy
from components.clock import Clock
from components.units import format_count
from recipes.batch_policy import build_batch_policy
from recipes.contracts import complete_schedule

MOST_LANDMARKS = 60


class Step(NamedTuple):
    """One optimizer step, before it is taken."""

    number: int
    """From 1."""
    tokens: int
    """Trained before this step."""
    requested: int
    """Samples the policy asked for."""
    batch: int
    """Samples it takes."""
    micro_batches: int
    """Of each rank."""
    lr: float


@dataclass(frozen=True)
class Landmark:
    """A step worth showing."""

    why: str
    step: Step


@dataclass
class Course:
    """A whole run, the policy told nothing of any gradient: one that measures stays where it starts."""

    landmarks: list[Landmark] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    largest: int = 0
    """The largest batch, in samples."""
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

    def lines(self, sequence_length: int) -> Iterator[str]:
        """Its landmarks as a table."""
        yield f"{'step':>10} {'after tokens':>16} {'batch':>7} {'batch tokens':>12} {'micro':>6} {'lr':>10}"
        for mark in self.landmarks:
            step, batch_tokens = mark.step, format_count(mark.step.batch * sequence_length)
            yield (
                f"{step.number:>10,} {step.tokens:>16,} {step.batch:>7,} {batch_tokens:>12} "
                f"{step.micro_batches:>6,} {step.lr:>10.3g}  {mark.why}"
            )


def steps(recipe: Any, layout: BatchLayout, policy: BatchPolicy | None = None) -> Iterator[Step]:
    """Every step of a run whose policy, by default that of [batch], is told nothing.

    Raises ValueError where the policy asks for a batch that is none, or does not go with the schedule.
    """
    training = recipe.training
    policy = policy or build_batch_policy(recipe)
    clock = Clock(training.total_tokens, training.sequence_length)
    while not clock.done:
        batch = layout.fit(policy.next_batch_size(clock))
        lr = recipe.lr_schedule.lr(clock.tokens, batch.samples * training.sequence_length, clock.total_tokens)
        yield Step(clock.step + 1, clock.tokens, batch.requested, batch.samples, batch.micro_batches, lr)
        clock.advance(batch.samples)


def play(recipe: Any, layout: BatchLayout) -> Course:
    """The course of `steps(recipe, layout)`; raises what that does."""
    return summarise(steps(recipe, layout), recipe)


def summarise(taken: Iterable[Step], recipe: Any) -> Course:
    """What is worth telling of the steps of a run, at least one of them."""
    length, total = recipe.training.sequence_length, recipe.training.total_tokens
    warmup = complete_schedule(recipe.lr_schedule).warmup_tokens
    course = Course()
    last, highest, tenths = None, None, 0
    for step in taken:
        why = []
        if last is None:
            why.append("first")
        elif step.batch != last.batch:
            why.append("batch")
        if step.tokens < warmup <= step.tokens + step.batch * length:
            why.append("warmed up")
        if step.tokens * 10 // total > tenths:
            tenths = step.tokens * 10 // total
            why.append(f"{tenths}0 %")
        last = step
        if why and len(course.landmarks) < MOST_LANDMARKS:
            course.landmarks.append(Landmark(", ".join(why), step))
        if highest is None or step.lr > highest.lr:
            highest = step
        if step.batch != step.requested:
            course.rounded[step.requested] = step.batch
        course.warmup_steps += step.tokens < warmup
        course.zero_from = (step.tokens if course.zero_from is None else course.zero_from) if step.lr == 0 else None
        if course.bad_rate is None and not (math.isfinite(step.lr) and step.lr >= 0):
            course.bad_rate = (step.number, step.lr)
        course.samples += step.batch
        course.largest = max(course.largest, step.batch)
    assert last is not None and highest is not None
    course.landmarks = _with(_with(course.landmarks, highest, "highest rate"), last, "last")
    course.steps, course.tokens = last.number, course.samples * length
    return course


def _with(landmarks: list[Landmark], extra: Step, why: str) -> list[Landmark]:
    """`landmarks` in order of steps, `extra` among them, with one more reason."""
    by_step = {mark.step.number: mark for mark in landmarks}
    mark = by_step.get(extra.number)
    by_step[extra.number] = Landmark(why, extra) if mark is None else replace(mark, why=f"{mark.why}, {why}")
    return [by_step[number] for number in sorted(by_step)]
