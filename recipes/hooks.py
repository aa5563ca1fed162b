"""Hooks: code that the training loop calls at named points, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.clock import TrainingClock
from components.defaults import with_defaults
from components.errors import InputError
from recipes.errors import raised_in


@dataclass(frozen=True)
class HookContext:
    """What a hook may use of the run. Tensors are those of this rank."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clock: TrainingClock
    """Steps, samples and tokens trained so far; not to be changed."""
    device: torch.device
    rank: int
    world_size: int
    directory: Path
    """The run directory."""
    log_metrics: Callable[[Mapping[str, float]], None]
    """Write values, by name, to metrics.jsonl and TensorBoard at the current step. Has no effect but on rank 0."""


class Hook:
    """The points of the training loop; each method does nothing by default.

    A class of the user's need not derive from this one: it is called at the points that it defines, on every rank. An
    exception ends the run and is reported with the name of the hook's section.
    """

    def on_run_begin(self, context: HookContext) -> None:
        """Called before the first step, after a checkpoint was loaded."""

    def on_step_begin(self, context: HookContext) -> None:
        """Called before a step: `context.clock.step` steps were trained."""

    def on_gradients_ready(self, context: HookContext) -> None:
        """Called when the gradients of a step are reduced and clipped, before the update that uses them.

        On a GPU they may still be being computed. Not called for a step that is skipped as bad.
        """

    def on_step_end(self, context: HookContext) -> None:
        """Called after a step, before the checkpoint and the validation that are due at it."""

    def on_run_end(self, context: HookContext) -> None:
        """Called at the end of the run, or when it was stopped, after the last checkpoint and validation."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a resumed run needs, as JSON; it is saved in every checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""


POINTS = [name for name in vars(Hook) if name.startswith("on_")]


def complete_hook(hook: Any) -> Hook:
    """Return `hook` as a `Hook`: points that its class does not define do nothing. Raises InputError if it has none."""
    if not any(callable(getattr(hook, point, None)) for point in POINTS):
        raise InputError("use", f"{type(hook).__name__} is not a hook: it has none of {', '.join(POINTS)}")
    return with_defaults(hook, Hook)


class Hooks:
    """Calls the hooks of a run: those of the loop itself before and after those of [hooks].

    On each step: the profiler, [hooks] in the order of the recipe, saving, validation, garbage collection. So a
    checkpoint holds the state of [hooks] after its step. At the end of the run [hooks] come last.
    """

    def __init__(self, before: Sequence[Hook], own: Mapping[str, Hook], after: Sequence[Hook]) -> None:
        """`own` are those of [hooks] by name."""
        self.own = own
        named = [(f"hooks.{name}", hook) for name, hook in own.items()]
        first, last = ([(None, hook) for hook in hooks] for hooks in (before, after))
        self._in_step: list[tuple[str | None, Hook]] = [*first, *named, *last]
        self._at_end: list[tuple[str | None, Hook]] = [*first, *last, *named]

    def call(self, point: str, context: HookContext) -> None:
        """Call the method `point`, one of `POINTS`, of every hook."""
        for section, hook in self._at_end if point == "on_run_end" else self._in_step:
            with raised_in(section) if section else nullcontext():
                getattr(hook, point)(context)
