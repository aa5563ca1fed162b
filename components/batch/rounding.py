"""Round a requested batch size up to a whole number of micro-batches of fixed shape on every rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepBatch:
    """The batch of one optimizer step."""

    requested: int
    """Samples that the policy requested."""
    samples: int
    """Samples that the step trains on: the global batch size."""
    micro_batches: int
    """Micro-batches of each data-parallel rank: the gradient accumulation steps."""


@dataclass(frozen=True)
class BatchRounding:
    """Splits a global batch into `micro_batches` per rank of `micro_batch_size` samples on `dp_size` ranks.

    Only the *number* of micro-batches changes with the batch size. Their shape is fixed, so a change neither recompiles
    nor reallocates anything, and the samples that the loader has prefetched stay valid.
    """

    micro_batch_size: int
    dp_size: int

    @property
    def samples_per_micro_step(self) -> int:
        """Samples of one micro-batch on every data-parallel rank: every batch size is a multiple of it."""
        return self.micro_batch_size * self.dp_size

    def __str__(self) -> str:
        return f"{self.samples_per_micro_step} = {self.dp_size} ranks x {self.micro_batch_size} per micro-batch"

    def round_up(self, requested: int) -> StepBatch:
        """Return the batch of `requested` samples, rounded up to a multiple of `samples_per_micro_step`."""
        if requested < 1:
            raise ValueError(f"the batch policy asked for {requested} samples; a step needs at least 1")
        micro_batches = -(-requested // self.samples_per_micro_step)
        return StepBatch(requested, micro_batches * self.samples_per_micro_step, micro_batches)

    def can_measure_noise(self, batch: StepBatch) -> bool:
        """Return whether gradient noise can be measured: it needs at least 2 micro-batches over all ranks."""
        return batch.micro_batches * self.dp_size > 1
