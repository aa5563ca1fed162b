"""Read the micro-batches of a step and check them on all ranks before the first one is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from components.data.loader import MicroBatch, MicroBatchLoader
from components.distributed.collectives import describe_error, try_call
from components.distributed.context import DistributedContext
from components.profiler_range import profiler_range
from components.token_ids import check_token_ids


@dataclass(frozen=True)
class BadSamples:
    """Samples of a step that could not be read, or that are not valid token ids."""

    first: str
    """The samples and the error of the first rank that found some, equal on all ranks."""
    failure: Exception | None
    """The error of this rank, if it found some."""


@dataclass(frozen=True)
class MicroBatchReader:
    """Reads this rank's micro-batches of a step."""

    loader: MicroBatchLoader
    world: DistributedContext
    sequence_length: int
    vocab_size: int

    def read(self, count: int) -> list[MicroBatch] | BadSamples:
        """Return the next `count` micro-batches, or `BadSamples` on all ranks if any rank found bad samples.

        The ranks agree before any of them computes: a rank that raised later would leave the others waiting in a
        collective. The next step starts after these micro-batches in either case.
        """
        micro_batches: list[MicroBatch] = []
        failure, where = None, ""
        stream = self.loader.next_step(count)
        for _ in range(count):
            micro_batch, error = try_call(lambda: self._next_checked(stream))
            if micro_batch is not None:
                micro_batches.append(micro_batch)
            elif failure is None:
                ids = self.loader.last_samples
                failure, where = error, f"samples {ids.start} to {ids.stop - 1}"
        if not self.world.all_reduce_max(int(failure is not None)):
            return micro_batches
        message = "" if failure is None else f"{where}: {describe_error(failure)}"
        return BadSamples(next(text for text in self.world.gather(message) if text), failure)

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
