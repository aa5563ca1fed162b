"""Whole documents, each token predicted once, with as much of its document before it as a window holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.distributed.collectives import describe_error, try_call
from components.errors import InputError
from components.interfaces import Comm
from components.token_ids import IGNORE_INDEX, check_token_ids
from components.validation.totals import LossTotals, UnreadableError

# D documents, W windows of a micro-batch, T inputs of the longest of them, V vocabulary


@runtime_checkable
class Documents(Protocol):
    """Documents one after the other, each with its end-of-document token."""

    def document_lengths(self) -> np.ndarray:
        """(D, 2) int64: tokens with the end token, and bytes of text."""
        ...

    def tokens(self, start: int, count: int) -> np.ndarray:
        """(count,) int64 ids, `start` being counted over all documents."""
        ...


class Window(NamedTuple):
    """One forward pass over a part of a document. Input 0 of a document is the separator, input i its token i - 1."""

    document: int
    start: int
    """The first input."""
    end: int
    """After the last."""
    counted: int
    """Targets at its end that no window before had."""


def windows(lengths: Sequence[int], size: int, stride: int) -> Iterator[Window]:
    """Those of all documents; `lengths` are their tokens.

    The first window of a document counts all its targets. Each further one ends up to `stride` tokens later, is as
    long as `size` allows, and counts the targets that are new: a token that is not in the first window is predicted
    from at least size - stride tokens.
    """
    for document, length in enumerate(lengths):
        end = min(size, length)
        yield Window(document, 0, end, end)
        while end < length:
            before, end = end, min(end + stride, length)
            yield Window(document, max(0, end - size), end, end - before)


@dataclass(frozen=True)
class SlidingWindow:
    """The first `limit` documents (None: all) under windows of `size` tokens, `stride` apart."""

    documents: Documents
    vocab_size: int
    end_of_document: int
    size: int
    stride: int
    micro_batch_size: int
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.size:
            raise InputError("stride", f"{self.stride} must be from 1 to the window of {self.size} tokens")

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        world: Comm,
        compute: Callable[[], AbstractContextManager[object]],
        *,
        multiple: int = 1,
    ) -> list[LossTotals]:
        """Of each document, equal on all ranks. `multiple` divides the tokens of every forward pass.

        Raises UnreadableError, on the rank that meets it, for a document that cannot be used.
        """
        failure: Exception | None = None
        model.eval()
        sizes = self.documents.document_lengths()[: self.limit].tolist()
        starts = [0, *accumulate(tokens for tokens, _ in sizes)]
        nats_D = torch.zeros(len(sizes), dtype=torch.float64)
        waiting = windows([tokens for tokens, _ in sizes], self.size, self.stride)
        with compute():
            while unit := list(islice(waiting, self.micro_batch_size * world.size)):
                mine = unit[world.rank * self.micro_batch_size : (world.rank + 1) * self.micro_batch_size]
                # Sharded models need equally many forward passes on all ranks: one without windows takes one too.
                given = mine or [unit[0]._replace(counted=0)]
                batch, error = try_call(lambda given=given: self._batch(given, starts, multiple))  # type: ignore[misc]
                if batch is None:  # a rank that left now would leave the others in a forward pass
                    failure = failure or error
                    batch = self._padding(given, multiple)
                inputs_WT, labels_WT = batch
                logits_WTV = model(inputs_WT.to(world.device))
                for window, logits_TV, labels_T in zip(given, logits_WTV, labels_WT.to(world.device), strict=True):
                    loss = F.cross_entropy(logits_TV.float(), labels_T, reduction="sum", ignore_index=IGNORE_INDEX)
                    nats_D[window.document] += float(loss)
        model.train()
        nats = world.all_reduce_sum(nats_D).tolist()
        if failure is not None:
            raise UnreadableError(describe_error(failure)) from failure
        return [LossTotals(each, *size) for each, size in zip(nats, sizes, strict=True)]

    def _batch(self, given: Sequence[Window], starts: Sequence[int], multiple: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels (W, T) of windows, padded on the right, where no counted position sees it."""
        inputs_WT, labels_WT = self._padding(given, multiple)
        for row, (document, start, end, counted) in enumerate(given):
            # the separator is not read: it is the last token of the document before, and the first has none
            text = self.documents.tokens(starts[document] + max(start - 1, 0), end - max(start - 1, 0))
            ids = torch.from_numpy(text)
            check_token_ids(ids, self.vocab_size)
            inputs_WT[row, start == 0 : end - start] = ids[:-1]
            labels_WT[row, end - start - counted : end - start] = ids[len(ids) - counted :]
        return inputs_WT, labels_WT

    def _padding(self, given: Sequence[Window], multiple: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels (W, T) that hold no text yet."""
        longest = max(window.end - window.start for window in given)
        shape = (len(given), -(-longest // multiple) * multiple)
        return torch.full(shape, self.end_of_document), torch.full(shape, IGNORE_INDEX)
