"""What the layout of a run can represent: a requested batch becomes a number of fixed-shape micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepBatch:
    """The batch of one optimizer step."""

    requested: int
    """Samples the policy asked for."""
    samples: int
    """Samples the step takes: global batch size."""
    micro_batches: int
    """Micro-batches each data-parallel rank runs: gradient-accumulation steps."""


@dataclass(frozen=True)
class BatchRounding:
    """Splits a global batch into `micro_batches` per rank of `micro_batch_size` samples on `dp_size` ranks.

    Only the *number* of micro-batches follows the batch. Their shape is fixed, so a resize neither recompiles nor
    reallocates, and what the loader has prefetched stays good.
    """

    micro_batch_size: int
    dp_size: int

    @property
    def unit(self) -> int:
        """Samples of one micro-batch on every data-parallel rank: every batch is a multiple of it."""
        return self.micro_batch_size * self.dp_size

    def fit(self, requested: int) -> StepBatch:
        """`requested` samples, rounded up to a multiple of the unit."""
        if requested < 1:
            raise ValueError(f"the batch policy asked for {requested} samples; a step needs at least 1")
        micro_batches = -(-requested // self.unit)
        return StepBatch(requested, micro_batches * self.unit, micro_batches)

    def shows_noise(self, batch: StepBatch) -> bool:
        """Return whether the gradient noise of a step can be measured: it needs two micro-batches over all ranks."""
        return batch.micro_batches * self.dp_size > 1
