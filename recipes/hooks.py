"""Hooks: code that the training loop calls at named points, in a fixed order.

To add a point, add a method `on_...` to `Hook`, and call it with `self.hooks.call("on_...", self.context)` where it
belongs in `Trainer.train` or `Trainer.update_weights` of pretrain.py. builtin_hooks.py has the hooks of the loop
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.clock import TrainingClock
from components.distributed import heartbeat
from components.errors import InputError
from components.protocol_defaults import with_defaults
from recipes.errors import raised_in


@dataclass(frozen=True)
class HookContext:
    """The parts of a run that a hook may use. Tensors are those of this rank."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clock: TrainingClock
    """Steps, samples and tokens trained so far; read-only."""
    device: torch.device
    rank: int
    world_size: int
    directory: Path
    """The run directory."""
    log_metrics: Callable[[Mapping[str, float]], None]
    """Writes values by name to metrics.jsonl and TensorBoard at the current step. No-op on ranks other than 0."""


class Hook:
    """The points of the training loop; each method does nothing by default.

    A custom hook need not derive from this class: it is called on every rank at the points that it defines. An
    exception ends the run and is reported with the section of the hook.
    """

    def on_run_begin(self, context: HookContext) -> None:
        """Called before the first step, after a checkpoint was loaded."""

    def on_step_begin(self, context: HookContext) -> None:
        """Called before a step, when `context.clock.step` steps are done."""

    def on_gradients_ready(self, context: HookContext) -> None:
        """Called after the gradients of a step are reduced and clipped, before the optimizer update.

        Not called for a step that is skipped as bad. On a GPU the work may still be queued, so that it is also called
        for a step whose gradients are not finite; the device then skips the update.
        """

    def on_step_end(self, context: HookContext) -> None:
        """Called after a step, before a checkpoint or validation that is due at it."""

    def on_run_end(self, context: HookContext) -> None:
        """Called when the run ends or is stopped, after the last checkpoint and validation.

        Not called after an error, nor if no step was left to train.
        """

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state to save in every checkpoint, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


POINTS = [name for name in vars(Hook) if name.startswith("on_")]


def complete_hook(hook: Any) -> Hook:
    """Return `hook` with no-ops for the points that its class lacks. Raises InputError if it defines no point."""
    if not any(callable(getattr(hook, point, None)) for point in POINTS):
        raise InputError("use", f"{type(hook).__name__} is not a hook: it has none of {', '.join(POINTS)}")
    return with_defaults(hook, Hook)


class Hooks:
    """Calls the hooks of a run in a fixed order.

    On each step: the profiler, [hooks] in the order of the recipe, saving, validation, tasks, garbage collection. A
    checkpoint therefore holds the state of [hooks] after its step. At the end of the run [hooks] come last.
    """

    def __init__(self, before: Sequence[Hook], custom: Mapping[str, Hook], after: Sequence[Hook]) -> None:
        """`before` and `after` are hooks of the loop itself; `custom` are those of [hooks] by name."""
        named = [(f"hooks.{name}", hook) for name, hook in custom.items()]
        first, last = ([(None, hook) for hook in hooks] for hooks in (before, after))
        self._in_step: list[tuple[str | None, Hook]] = [*first, *named, *last]
        self._at_end: list[tuple[str | None, Hook]] = [*first, *last, *named]

    def call(self, point: str, context: HookContext) -> None:
        """Call the method `point`, one of `POINTS`, of every hook."""
        heartbeat.beat(first=point == "on_step_end")  # the first step may compile for minutes
        if point == "on_run_end":
            heartbeat.end()
        for section, hook in self._at_end if point == "on_run_end" else self._in_step:
            with raised_in(section) if section else nullcontext():
                getattr(hook, point)(context)
