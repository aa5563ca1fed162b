"""Parts of a run that only pretend to take time: they advance a simulated clock, so a busy machine changes nothing.

Step times are read from that clock once `recipes.step_timer.time` is `CLOCK`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from components.distributed.fsdp import GradSync
from models.llama import Llama
from recipes import step_timer


class Clock:
    """A clock that almost stands still unless a part of the run sleeps."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@dataclass(kw_only=True)
class SlowLlama(Llama):
    """A Llama with a cost of each micro-batch."""

    pass_seconds: float

    def build(self, **sizes):
        model = super().build(**sizes)
        forward = model.forward

        def slow(*args, **kwargs):
            CLOCK.sleep(self.pass_seconds)
            return forward(*args, **kwargs)

        model.forward = slow
        return model


@dataclass(kw_only=True)
class SlowUpdate:
    """A hook with a cost of each step, which also makes the steps of this process be timed by the simulated clock."""

    step_seconds: float

    def on_run_begin(self, context) -> None:
        step_timer.time = CLOCK

    def on_gradients_ready(self, context) -> None:
        CLOCK.sleep(self.step_seconds)


@dataclass(kw_only=True)
class SlowNetwork:
    """A hook with a cost of each reduction of gradients over ranks, which differs by rank, on the simulated clock.

    Every rank writes the samples after each of its steps to `notes`.
    """

    reduction_seconds: float
    notes: Path

    def on_run_begin(self, context) -> None:
        self.samples, self.before = [], (step_timer.time, GradSync.prepare_backward)
        step_timer.time, GradSync.prepare_backward = CLOCK, self.slow(self.reduction_seconds * (1 + context.rank))

    def slow(self, seconds: float):
        prepare_backward = self.before[1]

        def slow(sync: GradSync, *, last: bool) -> None:
            if last or not sync.once_per_step:  # this backward reduces the gradients
                CLOCK.sleep(seconds)
            prepare_backward(sync, last=last)

        return slow

    def on_step_end(self, context) -> None:
        self.samples.append(context.clock.samples)

    def on_run_end(self, context) -> None:
        step_timer.time, GradSync.prepare_backward = self.before
        self.notes.mkdir(parents=True, exist_ok=True)
        (self.notes / f"rank-{context.rank}.json").write_text(json.dumps(self.samples))
