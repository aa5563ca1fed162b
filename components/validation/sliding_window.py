"""SlidingWindow: the loss of whole documents, each token predicted once from the part of a window before it.

The stride is `evaluation.stride` (recipes/evaluate.py). [validation] uses validator.py, without a stride.
"""

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
from components.evaluation_mode import evaluating
from components.interfaces import Comm
from components.token_ids import IGNORE_INDEX, check_token_ids
from components.validation.totals import LossTotals, UnreadableError

# D documents, W windows of a micro-batch, T inputs of the longest window, V vocabulary


@runtime_checkable
class Documents(Protocol):
    """A dataset with access to its documents, each with the end token and, if it is another one, the start token."""

    def document_lengths(self) -> np.ndarray:
        """Return (D, 2) int64: tokens, including start and end tokens, and bytes of text of each document."""
        ...

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Return (count,) int64 ids from position `start` of the concatenated documents."""
        ...


class Window(NamedTuple):
    """A part of a document in one forward pass. Input 0 of a document is its start token or else the end
    token, input i the token i - 1 after it."""

    document: int
    start: int
    """Its first input."""
    end: int
    """The input after its last one."""
    counted: int
    """The number of targets, at its end, that no earlier window has counted."""


def sliding_windows(lengths: Sequence[int], size: int, stride: int) -> Iterator[Window]:
    """Yield the windows of documents with `lengths` tokens.

    The first window of a document counts all its targets. Each next one ends up to `stride` tokens later, has up to
    `size` tokens, and counts only new targets, so a token after the first window is predicted from at least
    size - stride tokens.
    """
    for document, length in enumerate(lengths):
        end = min(size, length)
        yield Window(document, 0, end, end)
        while end < length:
            before, end = end, min(end + stride, length)
            yield Window(document, max(0, end - size), end, end - before)


@dataclass(frozen=True)
class SlidingWindow:
    """Evaluates the first `limit` documents (None: all) with windows of `size` tokens, `stride` apart."""

    documents: Documents
    vocab_size: int
    end_of_document: int
    size: int
    stride: int
    micro_batch_size: int
    limit: int | None = None
    start_of_document: int | None = None
    """The first input of every window, also within a document; it is never predicted."""

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.size:
            raise InputError("stride", f"{self.stride}; expected 1 to {self.size}, the tokens of a window")

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        world: Comm,
        compute: Callable[[], AbstractContextManager[object]],
        *,
        multiple: int = 1,
    ) -> list[LossTotals]:
        """Return the totals of each document, equal on all ranks.

        The inputs of every forward pass are padded to a multiple of `multiple` tokens. Raises UnreadableError, only on
        the rank with an invalid document.
        """
        failure: Exception | None = None
        lengths_D2 = self.documents.document_lengths()[: self.limit]
        prepended = self.start_of_document not in (None, self.end_of_document)  # token 0 of each document
        starts = [prepended + ends for ends in (0, *accumulate(lengths_D2[:, 0].tolist()))]
        sizes = (lengths_D2 - [prepended, 0]).tolist()
        nats_D = torch.zeros(len(sizes), dtype=torch.float64)
        windows = sliding_windows([tokens for tokens, _ in sizes], self.size, self.stride)
        with evaluating(model), compute():
            while unit := list(islice(windows, self.micro_batch_size * world.size)):
                local = unit[world.rank * self.micro_batch_size : (world.rank + 1) * self.micro_batch_size]
                # Sharded models need equally many forward passes on all ranks, also on a rank without a window.
                batch = local or [unit[0]._replace(counted=0)]
                pair, error = try_call(lambda batch=batch: self._read(batch, starts, multiple))  # type: ignore[misc]
                if pair is None:  # continue: without this rank, the others would wait in the forward pass
                    failure = failure or error
                    pair = self._padding(batch, multiple)
                inputs_WT, labels_WT = pair
                logits_WTV = model(inputs_WT.to(world.device))
                for window, logits_TV, labels_T in zip(batch, logits_WTV, labels_WT.to(world.device), strict=True):
                    loss = F.cross_entropy(logits_TV.float(), labels_T, reduction="sum", ignore_index=IGNORE_INDEX)
                    nats_D[window.document] += float(loss)
        nats = world.all_reduce_sum(nats_D).tolist()
        if failure is not None:
            raise UnreadableError(describe_error(failure)) from failure
        return [LossTotals(each, *size) for each, size in zip(nats, sizes, strict=True)]

    def _read(self, batch: Sequence[Window], starts: Sequence[int], multiple: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels (W, T) of `batch`, padded on the right, after all counted positions."""
        inputs_WT, labels_WT = self._padding(batch, multiple)
        for row, (document, start, end, counted) in enumerate(batch):
            # Input 0 of a document is the padding id, not read: the first document has no end token before it.
            text = self.documents.tokens(starts[document] + max(start - 1, 0), end - max(start - 1, 0))
            ids = torch.from_numpy(text)
            check_token_ids(ids, self.vocab_size)
            inputs_WT[row, start == 0 : end - start] = ids[:-1]
            if self.start_of_document is not None:
                inputs_WT[row, 0] = self.start_of_document
            labels_WT[row, end - start - counted : end - start] = ids[len(ids) - counted :]
        return inputs_WT, labels_WT

    def _padding(self, batch: Sequence[Window], multiple: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels (W, T) without text."""
        longest = max(window.end - window.start for window in batch)
        shape = (len(batch), -(-longest // multiple) * multiple)
        return torch.full(shape, self.end_of_document), torch.full(shape, IGNORE_INDEX)
