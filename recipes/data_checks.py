"""Read and check the micro-batches of a step; the ranks agree on the result while they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from components.data.loader import MicroBatch, MicroBatchLoader
from components.distributed.collectives import describe_error, try_call
from components.distributed.context import DistributedContext
from components.profiler_range import profiler_range
from components.token_ids import IGNORE_INDEX, check_token_ids


@dataclass(frozen=True)
class BadSamples:
    """Samples of a step that could not be read, or that are not valid token ids."""

    first: str
    """The samples and the error of the first rank that found some, equal on all ranks."""
    failure: Exception | None
    """The error of this rank, if it found some."""


@dataclass(frozen=True)
class StepSamples:
    """The samples of a step on this rank, which it can compute with before it knows that all ranks have theirs."""

    micro_batches: list[MicroBatch]
    """Bad ones are replaced by one without a label."""
    wait_for_bad: Callable[[], BadSamples | None]
    """Waits until all ranks have read theirs, and returns `BadSamples` on all of them if any found some."""


@dataclass(frozen=True)
class MicroBatchReader:
    """Reads this rank's micro-batches of a step."""

    loader: MicroBatchLoader
    world: DistributedContext
    sequence_length: int
    vocab_size: int

    def read(self, count: int) -> StepSamples:
        """Return the next `count` micro-batches.

        A rank with bad samples computes as the others do and raises later: they would wait for it in a collective. The
        ranks agree while the device computes, and before its results are used. The next step starts after these
        micro-batches in either case.
        """
        micro_batches: list[MicroBatch] = []
        failure, message = None, ""
        stream = self.loader.next_step(count)
        for _ in range(count):
            micro_batch, error = try_call(lambda: self._next_checked(stream))
            micro_batches.append(micro_batch or self._without_labels())
            if error is not None and failure is None:
                ids = self.loader.last_samples
                failure, message = error, f"samples {ids.start} to {ids.stop - 1}: {describe_error(error)}"
        found = self.world.start_all_reduce_max(int(failure is not None))

        def wait_for_bad() -> BadSamples | None:
            if not found():
                return None
            return BadSamples(next(text for text in self.world.gather(message) if text), failure)

        return StepSamples(micro_batches, wait_for_bad)

    def _without_labels(self) -> MicroBatch:
        ids = self.loader.last_samples
        tokens = torch.zeros(len(ids), self.sequence_length, dtype=torch.int64)
        return MicroBatch(tokens, torch.full_like(tokens, IGNORE_INDEX), torch.arange(ids.start, ids.stop))

    def _next_checked(self, stream: Iterator[MicroBatch]) -> MicroBatch:
        with profiler_range("next_micro_batch"):
            micro_batch = next(stream)
        length = micro_batch.tokens.shape[-1]
        if length != self.sequence_length:
            raise ValueError(
                f"the dataset returns {length + 1} token ids per sample; sequence_length = {self.sequence_length} "
                f"needs {self.sequence_length + 1}"
            )
        for part in (micro_batch.tokens, micro_batch.labels):
            check_token_ids(part, self.vocab_size)
        return micro_batch
