"""The built-in hooks of the training loop: profiling, saving, validation, and what follows the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from components.clock import TrainingClock
from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import DataParallelGroup
from components.garbage_collection import GarbageCollection
from components.interrupts import SAVE, StopRequests
from components.metrics.jsonl import last_rows
from components.profiler import Profiler
from components.validation import Validator
from recipes.checkpointing import RunCheckpoints
from recipes.errors import call_on_all_ranks
from recipes.hooks import Hook, HookContext

log = logging.getLogger("powertrain")


def is_due(interval_steps: int | None, clock: TrainingClock) -> bool:
    """Return True every `interval_steps` steps, except at the last step, which `on_run_end` handles."""
    return interval_steps is not None and clock.step % interval_steps == 0 and not clock.done


@dataclass
class ProfileSteps(Hook):
    """Marks the start and end of every step for the profiler."""

    profiler: Profiler

    def on_step_begin(self, context: HookContext) -> None:
        self.profiler.start_step(context.clock.step + 1)

    def on_step_end(self, context: HookContext) -> None:
        self.profiler.end_step()


@dataclass
class SaveCheckpoints(Hook):
    """Saves at intervals, at the end, and on request."""

    checkpoints: RunCheckpoints
    requests: StopRequests
    interval_steps: int | None
    in_memory_interval_steps: int | None

    def on_step_end(self, context: HookContext) -> None:
        if self.requests.agreed == SAVE or is_due(self.interval_steps, context.clock):
            self.checkpoints.read_launched()  # this save also serves a request that arrives with the current step
            self.requests.mark_saved()
            self.checkpoints.save()
        elif is_due(self.in_memory_interval_steps, context.clock):
            self.checkpoints.save_in_memory()

    def on_run_end(self, context: HookContext) -> None:
        manager = self.checkpoints.manager
        manager.wait()
        if manager.saved_step != context.clock.step:
            self.checkpoints.save()


@dataclass
class EvaluateModel(Hook):
    """Evaluates the model at intervals and at the end, and writes a row with the metrics.

    Runs after the save, so that unreadable data does not prevent it. A resumed run that was killed after saving a step,
    before the evaluation due at it, evaluates at its start.
    """

    checkpoints: RunCheckpoints
    dp: DataParallelGroup
    compute: Callable[[], AbstractContextManager[object]]
    metrics: Path
    """The file metrics.jsonl."""

    prefix: ClassVar[str]
    """The beginning of the names of its metrics."""

    def due(self, clock: TrainingClock) -> Sequence[Any]:
        """Return what to evaluate after the step of `clock`; everything after the last step."""
        raise NotImplementedError

    def evaluate(self, due: Sequence[Any], context: HookContext) -> dict[str, float]:
        """Return the metrics of what is due."""
        raise NotImplementedError

    def on_run_begin(self, context: HookContext) -> None:
        is_missing = context.rank == 0 and bool(self.due(context.clock)) and self._lacks_row(context.clock.step)
        if self.checkpoints.world.all_reduce_max(int(is_missing)):
            self._write_row(context)

    def on_step_end(self, context: HookContext) -> None:
        if not context.clock.done:  # `on_run_end` follows, after the last save
            self._write_row(context)

    def on_run_end(self, context: HookContext) -> None:
        if context.clock.done:
            self._write_row(context)

    def _write_row(self, context: HookContext) -> None:
        if due := self.due(context.clock):
            self.checkpoints.read_launched()
            context.log_metrics(self.evaluate(due, context))
            self.checkpoints.restart_timer()

    def _lacks_row(self, step: int) -> bool:
        """Return whether metrics.jsonl ends with the training step `step`, without a metric of this hook."""
        rows = last_rows(self.metrics)
        trained = any("loss" in row and row["step"] == step for row in rows)
        return trained and not any(key.startswith(self.prefix) for row in rows for key in row)


@dataclass
class Validate(EvaluateModel):
    """Evaluates the validation loss, and that of every average of the weights."""

    validation: Validator
    interval_steps: int | None
    prefix = "val_loss"

    def due(self, clock: TrainingClock) -> Sequence[Validator]:
        return [self.validation] if clock.done or is_due(self.interval_steps, clock) else []

    def evaluate(self, due: Sequence[Validator], context: HookContext) -> dict[str, float]:
        """Return the metrics. Raises ConfigError at [validation] if the data cannot be read."""
        run = self.checkpoints

        def losses() -> dict[str, float]:
            return call_on_all_ranks(
                lambda: self.validation.evaluate(context.model, self.dp, self.compute),
                run.config,
                "validation",
                run.world,
            )

        values = losses()
        for name in run.state.averages.started():
            with run.state.averages.swapped(name):
                values |= {f"{key}_average_{name}": value for key, value in losses().items()}
        return values


@dataclass
class AfterFirstStep(Hook):
    """Shortens the timeouts of collectives after the first step, which compiles, and logs the compile time."""

    world: DistributedContext
    compiles: bool
    started_at: int

    def on_step_end(self, context: HookContext) -> None:
        if context.clock.step != self.started_at + 1:
            return
        self.world.shorten_timeouts()
        if self.compiles:
            from torch._dynamo.utils import calculate_time_spent

            log.info(f"compiling took {calculate_time_spent().get('total_wall_time', 0.0):.0f} s")


@dataclass
class CollectGarbage(Hook):
    """Runs the garbage collector of Python at the same steps on every rank."""

    garbage: GarbageCollection

    def on_step_end(self, context: HookContext) -> None:
        self.garbage.after_step(context.clock.step)
