"""What becomes of a step whose numbers are bad: its loss, its gradient, its learning rate, or the state it made."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from components.distributed.collectives import attempt
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


class NonFiniteStateError(NonFiniteError):
    """The parameters or the optimizer's state are not finite: there is nothing to save."""


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
        if _return_to_checkpoint(run, what, ", and these samples are stepped over"):
            return
        what = f"{what}; there is no checkpoint yet to return to"
    log.warning(f"{what}; its update is left out")


def learning_rate(run: TrainingRun, step_tokens: int) -> float:
    """Return the learning rate of the step that starts now, on `step_tokens` tokens of all ranks.

    Raises BadStepError, after saving, for one that no step may be taken at: a schedule is a pure function, so no step
    after this one would help. It needs only numbers of the host, and comes before anything is computed.
    """
    schedule, clock = run.recipe.lr_schedule, run.clock
    lr, error = attempt(lambda: float(schedule.lr(clock.tokens, step_tokens, clock.total_tokens)))
    if lr is not None and math.isfinite(lr) and lr >= 0:
        return lr
    found = f"gives the learning rate {lr}" if error is None else f"raises {type(error).__name__}: {error}"
    if error is not None:  # a mistake in its code: the message alone would not find it
        log.critical("the run crashed in [lr_schedule]; the traceback is in log.txt, too", exc_info=error)
    run.save_before_end()
    raise BadStepError(
        f"step {clock.step + 1}: [lr_schedule] {type(schedule).__name__} {found} after {clock.tokens} tokens; it has "
        "to be finite, and 0 or more. The step was not taken; the last good checkpoint is "
        f"{run.store.newest() or 'none'}. Correct the schedule and continue with --resume"
    ) from error


def require_finite_state(run: TrainingRun) -> None:
    """Raise NonFiniteStateError if a parameter or a state of the optimizer is not finite on any rank.

    Every rank calls it before a save, so that no such state is saved, nor takes the place of a sound checkpoint. Where
    `[guard] on_nonfinite` says roll_back, the state becomes that of the newest checkpoint instead.
    """
    if not (names := _not_finite(run)):
        return
    what = f"the state after step {run.clock.step} is not finite: {names}"
    if run.guard.rules.on_nonfinite == "roll_back" and _return_to_checkpoint(run, what) and not _not_finite(run):
        return
    run.is_sound = False
    raise NonFiniteStateError(
        f"{what}. It is not saved; the last good checkpoint is {run.store.newest() or 'none'}. Lower the learning rate "
        "(lr_schedule) and continue from there with --resume, or start again where there is none"
    )


def _not_finite(run: TrainingRun) -> str:
    """The first names that a rank has found, the same on all; empty where all is finite."""
    names = run.tensors.not_finite()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return next(filter(None, run.world.gather(", ".join(names[:3]) + more)), "")


def _return_to_checkpoint(run: TrainingRun, what: str, besides: str = "") -> bool:
    """Make the state that of the newest intact checkpoint and log `what`; False where there is none."""
    run.store.wait()
    damages: list[str] = []
    checkpoint = newest_sound(run.store.complete(), run.world, damages)
    for damage in damages:
        log.warning(f"{damage}; taking the checkpoint before it")
    if checkpoint is None:
        return False
    run.is_sound = False  # until all of it is read
    roll_back(run, checkpoint)
    run.is_sound = True
    log.warning(f"{what}; parameters and optimizer are those of {checkpoint.name} again{besides}")
    return True


def _stop(run: TrainingRun, bad: BadStep, what: str) -> None:
    key = "on_spike" if bad.finite else "on_nonfinite"
    try:
        run.save_before_end()
    except NonFiniteStateError as error:  # skipping the step would not help
        raise NonFiniteStateError(f"{what}. The parameters were not updated, but {error}") from None
    raise (BadStepError if bad.finite else NonFiniteError)(
        f"{what}. The parameters were not updated; the last good checkpoint is {run.store.newest() or 'none'}. "
        f"To leave such steps out, continue with --resume --guard.{key}=skip; roll_back returns to the checkpoint"
    )
