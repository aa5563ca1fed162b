"""The built-in hooks of the training loop: profiling, saving, validation, and what follows the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from components.clock import TrainingClock
from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import DataParallelGroup
from components.garbage_collection import GarbageCollection
from components.interrupts import SAVE, StopRequests, is_stop
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


def lacks_row(metrics: Path, step: int, is_wanted: Callable[[str], bool]) -> bool:
    """Return whether the file metrics.jsonl ends with the training step `step`, without a metric of a wanted name."""
    rows = last_rows(metrics)
    trained = any("loss" in row and row["step"] == step for row in rows)
    return trained and not any(is_wanted(key) for row in rows for key in row)


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
class Validate(Hook):
    """Writes a row with the validation loss, and that of every average of the weights, at intervals and at the end.

    Runs after the save, so that unreadable validation data does not prevent it. Raises ConfigError at [validation] if
    the data cannot be read.
    """

    validation: Validator
    checkpoints: RunCheckpoints
    requests: StopRequests
    dp: DataParallelGroup
    compute: Callable[[], AbstractContextManager[object]]
    metrics: Path
    """The file metrics.jsonl."""

    def on_run_begin(self, context: HookContext) -> None:
        if self.checkpoints.world.all_reduce_max(int(self._is_missing(context))):
            self.validate(context.model, context.clock)

    def on_step_end(self, context: HookContext) -> None:
        if is_due(self._interval_steps, context.clock):
            self.validate(context.model, context.clock)

    def on_run_end(self, context: HookContext) -> None:
        if not is_stop(self.requests.agreed) or context.clock.done:
            self.validate(context.model, context.clock)

    def validate(self, model: nn.Module, clock: TrainingClock) -> None:
        """Evaluate `model`, with its weights and with each average of them, and write the row of this step."""
        run = self.checkpoints
        run.read_launched()

        def evaluate() -> dict[str, float]:
            return call_on_all_ranks(
                lambda: self.validation.evaluate(model, self.dp, self.compute), run.config, "validation", run.world
            )

        values = evaluate()
        for name in run.state.averages.started():
            with run.state.averages.swapped(name):
                values |= {f"{key}_average_{name}": value for key, value in evaluate().items()}
        run.metric_logger.log({"step": clock.step, "tokens": clock.tokens, **values})
        run.restart_timer()

    @property
    def _interval_steps(self) -> int | None:
        interval: int | None = self.checkpoints.config.recipe.validation.interval_steps
        return interval

    def _is_missing(self, context: HookContext) -> bool:
        """Return whether the resumed run was killed after saving this step, before the validation due at it."""
        due = context.clock.done or is_due(self._interval_steps, context.clock)
        return not context.rank and due and lacks_row(self.metrics, context.clock.step, "val_loss".__eq__)


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
