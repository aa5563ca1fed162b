"""The micro-batches of a step: read and checked on all ranks before the first of them is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from components.batch import StepBatch
from components.data.loader import MicroBatch
from components.processes import BAD_INPUT, attempt, described, raise_in_all
from components.profiler_range import profiler_range
from components.token_ids import check_token_ids
from recipes.errors import blame

if TYPE_CHECKING:
    from recipes.pretrain import TrainingRun

log = logging.getLogger("powertrain")


def read_step(run: TrainingRun, batch: StepBatch) -> list[MicroBatch] | None:
    """Return this rank's micro-batches of the step of `batch`; None if `[guard] on_bad_sample` skips the step.

    A sample is bad if reading it raises, or if it is not a sequence of token ids. All ranks agree on what becomes of
    the step before one of them computes: a rank that met a bad sample later would leave the others in a collective.
    Raises ConfigError at [data], on all ranks and after saving, where the run stops.
    """
    micro_batches: list[MicroBatch] = []
    failure, where = None, ""
    stream = run.loader.next_step(batch.micro_batches)
    for _ in range(batch.micro_batches):  # to the end, also after an error: the next step starts behind this one
        micro_batch, error = attempt(lambda: _next_checked(run, stream))
        if micro_batch is not None:
            micro_batches.append(micro_batch)
        elif failure is None:
            ids = run.loader.last_samples
            failure, where = error, f"samples {ids.start} to {ids.stop - 1}"
    if not run.world.maximum(int(failure is not None)):
        return micro_batches

    said = "" if failure is None else f"{where}: {described(failure)}"
    first = next(text for text in run.world.gather(said) if text)
    first_id = run.clock.samples
    step = f"step {run.clock.step + 1} (samples {first_id} to {first_id + batch.samples - 1})"
    bad = run.guard.judge_samples(f"{step} has a bad sample: {first}")
    if bad.action == "skip":
        log.warning(f"{bad.why}. The step is skipped")
        return None
    run.save_before_end()
    kept = f"the last good checkpoint is {run.store.newest() or 'none'}"
    remedy = "correct the data and continue with --resume; to skip such steps, add --guard.on_bad_sample=skip"
    if failure is not None and not isinstance(failure, BAD_INPUT):
        log.error(f"{bad.why}; {kept}; {remedy}")  # an error in the dataset's code: its traceback follows
    elif failure is not None:
        failure = ValueError(f"{bad.why}; {kept}; {remedy}")
    with blame(run.config, "data", started=True):
        raise_in_all(failure, run.world.gather)
    raise AssertionError("no rank raised")


def _next_checked(run: TrainingRun, stream: Iterator[MicroBatch]) -> MicroBatch:
    with profiler_range("next_micro_batch"):
        micro_batch = next(stream)
    length = micro_batch.tokens.shape[-1]
    if length != run.sequence_length:
        raise ValueError(
            f"the dataset gives {length + 1} token ids a sample; a sequence_length of {run.sequence_length} takes "
            f"{run.sequence_length + 1}"
        )
    for part in (micro_batch.tokens, micro_batch.labels):
        check_token_ids(part, run.vocab_size)
    return micro_batch
