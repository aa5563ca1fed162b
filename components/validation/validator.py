"""Validator: loss, perplexity and bits per byte on packed sequences of validation text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.distributed.collectives import describe_error, try_call
from components.evaluation_mode import evaluating
from components.interfaces import Comm, DataConfig, HasOrder, PackedDataset, Tokenizer
from components.token_ids import IGNORE_INDEX, check_token_ids, prepended_id
from components.units import PositiveCount
from components.validation.totals import LossTotals, UnreadableError


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """[validation]: computes the mean token loss over sequences of validation text."""

    data: DataConfig
    """The validation text: any component that is accepted in [data]."""
    interval_steps: PositiveCount | None = None
    """Optimizer steps between validations; unset: only at the end of the run."""
    max_sequences: PositiveCount | None = None
    """Use only this many sequences, spread over the text, of a mixture by its weights; unset: all sequences."""
    micro_batch_size: PositiveCount = 8
    """Sequences per forward pass on each rank."""

    def build(self, dataset: PackedDataset, *, tokenizer: Tokenizer, sequence_length: int) -> Validator:
        """Return the validator for `dataset`, which the caller builds from `data`."""
        # With `dataset` as an argument, the class does not match DataConfig, so [data] does not accept it.
        count = len(dataset) if self.max_sequences is None else min(len(dataset), self.max_sequences)
        # The first sequences would come from one file, or from one source of a mixture.
        if count < len(dataset) and isinstance(dataset, HasOrder):
            indices = sorted(dataset.order(seed=0)(np.arange(count))[1].tolist())
        else:
            indices = [number * len(dataset) // count for number in range(count)]
        byte_lengths = torch.from_numpy(tokenizer.byte_lengths)
        uncounted = prepended_id(tokenizer)
        return Validator(dataset, indices, byte_lengths, self.micro_batch_size, sequence_length, uncounted)


@dataclass(frozen=True, eq=False, repr=False)
class Validator:
    """Evaluates a model on the sequences `indices` of a dataset, each counted once on any number of ranks."""

    dataset: PackedDataset
    indices: Sequence[int]
    byte_lengths: Tensor
    """(V,) int64: the bytes of each token of the vocabulary."""
    micro_batch_size: int
    sequence_length: int
    uncounted: int | None = None
    """An id that is not predicted: the one that begins every document."""

    def evaluate(
        self, model: nn.Module, world: Comm, compute: Callable[[], AbstractContextManager[object]]
    ) -> dict[str, float]:
        """Return `val_loss` (nats per token), `val_perplexity` and `val_bits_per_byte`, equal on all ranks."""
        return self.totals(model, world, compute).metrics("val_")

    @torch.no_grad()
    def totals(
        self, model: nn.Module, world: Comm, compute: Callable[[], AbstractContextManager[object]]
    ) -> LossTotals:
        """Return the totals, equal on all ranks. Raises UnreadableError, only on the rank with an invalid sequence."""
        failure: Exception | None = None
        nats = torch.zeros((), dtype=torch.float64, device=world.device)
        token_count = byte_count = 0
        unit = self.micro_batch_size * world.size
        count = len(self.indices)
        with evaluating(model), compute():
            for first in range(0, count, unit):
                # Sharded models need equally many forward passes on all ranks: labels beyond the end are ignored.
                start = first + world.rank * self.micro_batch_size
                local = range(start, start + self.micro_batch_size)
                chunk, error = try_call(lambda local=local: self._read(local))  # type: ignore[misc]
                if chunk is None:  # continue: without this rank, the others would wait in the forward pass
                    failure = failure or error
                    chunk = torch.zeros(len(local), self.sequence_length + 1, dtype=torch.int64)
                tokens, labels = chunk[:, :-1], chunk[:, 1:].clone()
                labels[[number >= count for number in local]] = IGNORE_INDEX
                if self.uncounted is not None:
                    labels[labels == self.uncounted] = IGNORE_INDEX
                nats += model(_to(tokens, world.device), _to(labels, world.device))
                counted = labels[labels != IGNORE_INDEX]
                token_count += counted.numel()
                byte_count += int(self.byte_lengths[counted].sum())
        # the only synchronization with the device
        counts = torch.tensor([token_count, byte_count], dtype=torch.float64)
        totals = world.all_reduce_sum(torch.cat([nats.reshape(1).cpu(), counts]))
        if failure is not None:
            raise UnreadableError(describe_error(failure)) from failure
        return LossTotals(float(totals[0]), int(totals[1]), int(totals[2]))

    def _read(self, numbers: Sequence[int]) -> Tensor:
        """Return (n, T+1) int64: sequences `numbers` of `indices`; beyond the end, the last one is repeated."""
        sequences = [self.dataset[self.indices[min(number, len(self.indices) - 1)]] for number in numbers]
        width = self.sequence_length + 1
        if wrong := next((len(sequence) for sequence in sequences if len(sequence) != width), None):
            raise ValueError(
                f"the dataset returns samples of {wrong} token ids; sequence_length = {width - 1} needs {width}"
            )
        chunk = torch.stack(sequences)
        check_token_ids(chunk, len(self.byte_lengths))
        return chunk


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`, copied asynchronously."""
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)
