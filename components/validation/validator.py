"""Validation: loss, perplexity and bits per byte on text the model has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from components.distributed.collectives import describe_error, try_call
from components.interfaces import Comm, DataConfig, HasOrder, PackedDataset, Tokenizer
from components.token_ids import IGNORE_INDEX, check_token_ids
from components.units import PositiveCount
from components.validation.totals import LossTotals, UnreadableError


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """[validation]: the mean token loss over sequences of held-out text."""

    data: DataConfig
    """Where the text comes from: any component that fits [data]."""
    interval_steps: PositiveCount | None = None
    """Optimizer steps between validations; unset: only at the end of the run."""
    max_sequences: PositiveCount | None = None
    """Use only this many sequences, spread over all of the text, of a mixture by its weights; unset: all, once."""
    micro_batch_size: PositiveCount = 8
    """Sequences in one forward pass."""

    # `open`, not `build`: a class with that `build` would itself pass for [data]
    def open(
        self, *, tokenizer: Tokenizer, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> Validator:
        samples = self.data.build(
            tokenizer=tokenizer, sequence_length=sequence_length, cache_dir=cache_dir, progress=progress
        )
        count = len(samples) if self.max_sequences is None else min(len(samples), self.max_sequences)
        # the first would be the opening of one file, and of a mixture all of one source
        if count < len(samples) and isinstance(samples, HasOrder):
            indices = sorted(samples.order(seed=0, shuffle=True)(np.arange(count))[1].tolist())
        else:
            indices = [number * len(samples) // count for number in range(count)]
        byte_lengths = torch.from_numpy(tokenizer.byte_lengths)
        return Validator(samples, indices, byte_lengths, self.micro_batch_size, sequence_length)


class Validator:
    """Evaluates a model on the sequences of `indices`; each of them counts once on any number of ranks."""

    def __init__(
        self,
        samples: PackedDataset,
        indices: Sequence[int],
        byte_lengths: Tensor,
        micro_batch_size: int,
        sequence_length: int,
    ) -> None:
        """`byte_lengths` (V,) are those of each token of the vocabulary, V."""
        self.samples = samples
        self.indices = indices
        self.byte_lengths = byte_lengths
        self.micro_batch_size = micro_batch_size
        self.sequence_length = sequence_length

    def evaluate(
        self, model: nn.Module, world: Comm, compute: Callable[[], AbstractContextManager[object]]
    ) -> dict[str, float]:
        """`val_loss` (nats per token), `val_perplexity` and `val_bits_per_byte`, equal on all ranks."""
        totals = self.totals(model, world, compute)
        return {
            "val_loss": totals.loss,
            "val_perplexity": totals.perplexity,
            "val_bits_per_byte": totals.bits_per_byte,
        }

    @torch.no_grad()
    def totals(
        self, model: nn.Module, world: Comm, compute: Callable[[], AbstractContextManager[object]]
    ) -> LossTotals:
        """Equal on all ranks. Raises UnreadableError, on the rank that meets it, for a sequence that cannot be used."""
        failure: Exception | None = None
        model.eval()
        nats = torch.zeros((), dtype=torch.float64, device=world.device)
        token_count = byte_count = 0
        unit = self.micro_batch_size * world.size
        count = len(self.indices)
        with compute():
            for first in range(0, count, unit):
                # Sharded models need equally many forward passes on all ranks: beyond the end, labels are ignored.
                start = first + world.rank * self.micro_batch_size
                mine = range(start, start + self.micro_batch_size)
                chunk, error = try_call(lambda mine=mine: self._read(mine))  # type: ignore[misc]
                if chunk is None:  # a rank that left now would leave the others in a forward pass
                    failure = failure or error
                    chunk = torch.zeros(len(mine), self.sequence_length + 1, dtype=torch.int64)
                tokens, labels = chunk[:, :-1], chunk[:, 1:].clone()
                labels[[number >= count for number in mine]] = IGNORE_INDEX
                nats += model(_to(tokens, world.device), _to(labels, world.device))
                counted = labels[labels != IGNORE_INDEX]
                token_count += counted.numel()
                byte_count += int(self.byte_lengths[counted].sum())
        model.train()
        # the only time that the host waits for the device
        counts = torch.tensor([token_count, byte_count], dtype=torch.float64)
        totals = world.all_reduce_sum(torch.cat([nats.reshape(1).cpu(), counts]))
        if failure is not None:
            raise UnreadableError(describe_error(failure)) from failure
        return LossTotals(float(totals[0]), int(totals[1]), int(totals[2]))

    def _read(self, numbers: Sequence[int]) -> Tensor:
        """(n, T+1): these of the sequences of `indices`; beyond the end, the last one. Raises what reading raises."""
        sequences = [self.samples[self.indices[min(number, len(self.indices) - 1)]] for number in numbers]
        width = self.sequence_length + 1
        if wrong := next((len(sequence) for sequence in sequences if len(sequence) != width), None):
            raise ValueError(
                f"the dataset gives {wrong} token ids a sample; a sequence_length of {width - 1} takes {width}"
            )
        chunk = torch.stack(sequences)
        check_token_ids(chunk, len(self.byte_lengths))
        return chunk


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)
