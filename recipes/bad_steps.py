"""Handle a bad step: one whose loss, gradient, learning rate or samples are bad."""

from __future__ import annotations

import logging
import math
from typing import Protocol

from components.batch import StepBatch
from components.clock import TrainingClock
from components.distributed.collectives import BAD_INPUT_ERRORS, raise_on_all_ranks, try_call
from components.distributed.context import DistributedContext
from components.guard import BadStep, StepGuard
from recipes.config import Config
from recipes.data_checks import BadSamples
from recipes.errors import RunError, config_errors_at
from recipes.interfaces import LRSchedule
from recipes.launched_step import LaunchedStep

log = logging.getLogger("powertrain")


class BadStepError(RunError):
    """A step was bad, and the recipe says stop."""


class NonFiniteError(BadStepError):
    """The loss or the gradient norm of a step is not finite."""


class NonFiniteStateError(NonFiniteError):
    """The parameters or the optimizer's state are not finite: there is nothing to save."""


class Checkpoints(Protocol):
    """What is asked of the checkpoints of a run; see `recipes.checkpointing`."""

    @property
    def newest(self) -> str: ...
    def save_before_end(self) -> None: ...
    def return_to_newest(self, what: str, then: str = "") -> bool: ...


def handle_bad_step(bad: BadStep, launched: LaunchedStep, checkpoints: Checkpoints) -> None:
    """Do what the guard decided about a step whose update was skipped: go on, return to a checkpoint, or end.

    Raises BadStepError after saving the state without the step.
    """
    what = (
        f"step {launched.progress.step} (samples {launched.first_sample} to {launched.progress.samples - 1}): {bad.why}"
    )
    if bad.action == "stop":
        _stop(bad, what, checkpoints)
    if bad.action == "roll_back":
        if checkpoints.return_to_newest(what, ", and these samples are stepped over"):
            return
        what = f"{what}; there is no checkpoint yet to return to"
    log.warning(f"{what}; its update is left out")


def _stop(bad: BadStep, what: str, checkpoints: Checkpoints) -> None:
    key = "on_spike" if bad.finite else "on_nonfinite"
    try:
        checkpoints.save_before_end()
    except NonFiniteStateError as error:  # skipping the step would not help
        raise NonFiniteStateError(f"{what}. The parameters were not updated, but {error}") from None
    raise (BadStepError if bad.finite else NonFiniteError)(
        f"{what}. The parameters were not updated; the last good checkpoint is {checkpoints.newest}. "
        f"To leave such steps out, continue with --resume --guard.{key}=skip; roll_back returns to the checkpoint"
    )


def checked_lr(schedule: LRSchedule, clock: TrainingClock, step_tokens: int, checkpoints: Checkpoints) -> float:
    """Return the learning rate of the step that starts now, on `step_tokens` tokens of all ranks.

    Raises BadStepError, after saving, for one that no step may be taken at: a schedule is a pure function, so no step
    after this one would help. It needs only numbers of the host, and comes before anything is computed.
    """
    lr, error = try_call(lambda: float(schedule.lr(clock.tokens, step_tokens, clock.total_tokens)))
    if lr is not None and math.isfinite(lr) and lr >= 0:
        return lr
    found = f"gives the learning rate {lr}" if error is None else f"raises {type(error).__name__}: {error}"
    if error is not None:  # a mistake in its code: the message alone would not find it
        log.critical("the run crashed in [lr_schedule]; the traceback is in log.txt, too", exc_info=error)
    checkpoints.save_before_end()
    raise BadStepError(
        f"step {clock.step + 1}: [lr_schedule] {type(schedule).__name__} {found} after {clock.tokens} tokens; it has "
        "to be finite, and 0 or more. The step was not taken; the last good checkpoint is "
        f"{checkpoints.newest}. Correct the schedule and continue with --resume"
    ) from error


def handle_bad_samples(
    samples: BadSamples,
    batch: StepBatch,
    clock: TrainingClock,
    guard: StepGuard,
    checkpoints: Checkpoints,
    config: Config,
    world: DistributedContext,
) -> None:
    """Do what the guard decides about a step of which some rank could not read a sample: skip it, or end.

    Raises ConfigError at [data], on all ranks and after saving, or the error itself if the dataset's code is at fault.
    """
    step = f"step {clock.step + 1} (samples {clock.samples} to {clock.samples + batch.samples - 1})"
    bad = guard.count_bad_sample(f"{step} has a bad sample: {samples.first}")
    if bad.action == "skip":
        log.warning(f"{bad.why}. The step is skipped")
        return
    checkpoints.save_before_end()
    kept = f"the last good checkpoint is {checkpoints.newest}"
    remedy = "correct the data and continue with --resume; to skip such steps, add --guard.on_bad_sample=skip"
    failure = samples.failure
    if failure is not None and not isinstance(failure, BAD_INPUT_ERRORS):
        log.error(f"{bad.why}; {kept}; {remedy}")  # an error in the dataset's code: its traceback follows
    elif failure is not None:
        failure = ValueError(f"{bad.why}; {kept}; {remedy}")
    with config_errors_at(config, "data", started=True):
        raise_on_all_ranks(failure, world.gather)
    raise AssertionError("no rank raised")
