"""Handle a step whose loss, gradient norm, learning rate or samples are bad: skip, roll back or stop.

components/guard.py detects bad losses and gradients and decides; this carries out the decision.
"""

from __future__ import annotations

import logging
import math

from components.batch import StepBatch
from components.clock import TrainingClock
from components.distributed.collectives import BAD_INPUT_ERRORS, raise_on_all_ranks, try_call
from components.distributed.context import DistributedContext
from components.guard import BadStep, StepGuard
from recipes.checkpointing import RunCheckpoints
from recipes.config import Config
from recipes.data_checks import BadSamples
from recipes.errors import NonFiniteError, NonFiniteStateError, RunError, config_errors_at
from recipes.interfaces import LRSchedule
from recipes.step_results import LaunchedStep

log = logging.getLogger("powertrain")


def handle_bad_step(bad: BadStep, launched: LaunchedStep, checkpoints: RunCheckpoints) -> None:
    """Carry out the guard's decision on a step whose update was skipped: continue, roll back to a checkpoint, or stop.

    To stop, it saves the state without the step and raises RunError.
    """
    reason = (
        f"step {launched.progress.step} (samples {launched.first_sample} to {launched.progress.samples - 1}): {bad.why}"
    )
    if bad.action == "stop":
        _stop(bad, reason, checkpoints)
    if bad.action == "roll_back":
        if checkpoints.restore_newest(reason, "; these samples are skipped"):
            return
        reason = f"{reason}; there is no checkpoint to roll back to"
    log.warning(f"{reason}; update skipped")


def _stop(bad: BadStep, reason: str, checkpoints: RunCheckpoints) -> None:
    key = "on_spike" if bad.finite else "on_nonfinite"
    try:
        checkpoints.save_before_end()
    except NonFiniteStateError as error:  # continuing without the step would not help
        raise NonFiniteStateError(f"{reason}. The parameters were not updated, but {error}") from None
    raise (RunError if bad.finite else NonFiniteError)(
        f"{reason}. The parameters were not updated; the last good checkpoint is {checkpoints.newest}. "
        f"Continue with --resume --guard.{key}=skip to skip such steps, or =roll_back to also restore the checkpoint"
    )


def compute_lr(schedule: LRSchedule, clock: TrainingClock, step_tokens: int, checkpoints: RunCheckpoints) -> float:
    """Return the learning rate of the next step, which trains on `step_tokens` tokens over all ranks.

    Saves a checkpoint and raises RunError if the schedule raises, or returns a value that is negative or not
    finite. A schedule is a pure function, so retrying would not help. Uses only values on the host.
    """
    lr, error = try_call(lambda: float(schedule.lr(clock.tokens, step_tokens, clock.total_tokens)))
    if lr is not None and math.isfinite(lr) and lr >= 0:
        return lr
    found = f"returns the learning rate {lr}" if error is None else f"raises {type(error).__name__}: {error}"
    if error is not None:  # the traceback locates the mistake in its code
        log.critical("the run crashed in [lr_schedule]; the traceback is also in log.txt", exc_info=error)
    checkpoints.save_before_end()
    raise RunError(
        f"step {clock.step + 1}: [lr_schedule] {type(schedule).__name__} {found} after {clock.tokens} tokens; it must "
        f"be finite and >= 0. The step was not taken; the last good checkpoint is {checkpoints.newest}. Fix the "
        "schedule and continue with --resume"
    ) from error


def handle_bad_samples(
    samples: BadSamples,
    batch: StepBatch,
    clock: TrainingClock,
    guard: StepGuard,
    checkpoints: RunCheckpoints,
    config: Config,
    world: DistributedContext,
) -> None:
    """Carry out the guard's decision on a step with a sample that some rank could not read: skip the step, or stop.

    To stop, it saves a checkpoint and raises ConfigError at [data] on all ranks, or the original error if the dataset
    raised an error that does not stand for bad input.
    """
    step = f"step {clock.step + 1} (samples {clock.samples} to {clock.samples + batch.samples - 1})"
    bad = guard.count_bad_sample(f"{step} has a bad sample: {samples.first}")
    if bad.action == "skip":
        log.warning(f"{bad.why}; step skipped")
        return
    checkpoints.save_before_end()
    kept = f"the last good checkpoint is {checkpoints.newest}"
    remedy = "fix the data and continue with --resume; to skip such steps, add --guard.on_bad_sample=skip"
    failure = samples.failure
    if failure is not None and not isinstance(failure, BAD_INPUT_ERRORS):
        log.error(f"{bad.why}; {kept}; {remedy}")  # a bug in the dataset: its traceback follows
    elif failure is not None:
        failure = ValueError(f"{bad.why}; {kept}; {remedy}")
    with config_errors_at(config, "data", started=True):
        raise_on_all_ranks(failure, world.gather)
    raise AssertionError("no rank raised")
