"""What becomes of a step that the guard does not trust."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from components.guard import BadStep
from recipes.errors import RunError
from recipes.launched_step import LaunchedStep
from recipes.opening import newest_sound
from recipes.run_state import roll_back

if TYPE_CHECKING:
    from recipes.pretrain import TrainingRun

log = logging.getLogger("powertrain")


class BadStepError(RunError):
    """A step was bad, and the recipe says stop."""


class NonFiniteError(BadStepError):
    """The loss or the gradient norm of a step is not finite."""


def answer(run: TrainingRun, bad: BadStep, launched: LaunchedStep) -> None:
    """Do what the guard says of a step whose update was left out: go on, return to a checkpoint, or end.

    Raises BadStepError after saving the state without the step.
    """
    what = (
        f"step {launched.progress.step} (samples {launched.first_sample} to {launched.progress.samples - 1}): {bad.why}"
    )
    if bad.action == "stop":
        _stop(run, bad, what)
    if bad.action == "roll_back":
        run.store.wait()
        warnings: list[str] = []
        checkpoint = newest_sound(run.store.complete(), run.world, warnings)
        for warning in warnings:
            log.warning(warning)
        if checkpoint is not None:
            roll_back(run, checkpoint)
            log.warning(
                f"{what}; parameters and optimizer are those of {checkpoint.name} again, and these samples are "
                "stepped over"
            )
            return
        what = f"{what}; there is no checkpoint yet to return to"
    log.warning(f"{what}; its update is left out")


def _stop(run: TrainingRun, bad: BadStep, what: str) -> None:
    if run.clock.step > run.started_at:
        run.save()
    key = "on_spike" if bad.finite else "on_nonfinite"
    raise (BadStepError if bad.finite else NonFiniteError)(
        f"{what}. The parameters were not updated; the last good checkpoint is {run.store.newest() or 'none'}. "
        f"To leave such steps out, continue with --resume --guard.{key}=skip; roll_back returns to the checkpoint"
    )
