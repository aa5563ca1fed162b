"""Every token of every document is counted once, with the context of its window: checked one token at a time."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from components.validation import SlidingWindow, UnreadableError
from components.validation.sliding_window import sliding_windows

pytestmark = pytest.mark.quick

VOCAB, END = 11, 10
LENGTHS = (1, 5, 6, 7, 17, 2, 30)
"""Tokens of the documents, the end token among them."""


class Texts:
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randint(END, (length - 1,), generator=generator).tolist() for length in LENGTHS]
        self.each = [[*ids, END] for ids in drawn]

    def document_lengths(self):
        return np.array([[len(ids), 3 * len(ids)] for ids in self.each])

    def tokens(self, start, count):
        return np.array([id for ids in self.each for id in ids][start : start + count])


class SumsContext(nn.Module):
    """Its logits depend on every token before: a plain sum of embeddings."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))

    def forward(self, tokens):
        return self.table[tokens].cumsum(1)


class Rank:
    device = torch.device("cpu")

    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size

    def all_reduce_sum(self, tensor):
        return tensor


def by_hand(document, size, stride, start=None):
    """Nats of a document, a token at a time; with `start`, the first input of every window."""
    table, inputs, nats = SumsContext().table.detach().double(), [END, *document[:-1]], 0.0
    for target, id in enumerate(document):
        slides = max(0, math.ceil((target + 1 - size) / stride))
        end = min(size + slides * stride, len(document))
        context = inputs[max(0, end - size) : target + 1]
        context[0] = context[0] if start is None else start
        nats -= float(table[context].sum(0).log_softmax(-1)[id])
    return nats


@pytest.mark.parametrize(("size", "stride"), [(6, 6), (6, 1), (6, 4), (1, 1), (64, 32)])
@pytest.mark.parametrize("micro", [1, 3])
def test_each_token_is_predicted_once_with_the_context_of_its_window(size, stride, micro):
    texts = Texts()
    evaluated = SlidingWindow(texts, VOCAB, END, size, stride, micro)
    rows = evaluated.evaluate(SumsContext(), Rank(), nullcontext, multiple=4)
    assert [(row.tokens, row.bytes) for row in rows] == [(length, 3 * length) for length in LENGTHS]
    for row, document in zip(rows, texts.each, strict=True):
        assert row.nats == pytest.approx(by_hand(document, size, stride), rel=1e-5)  # float32


@pytest.mark.parametrize(("size", "stride"), [(6, 6), (6, 4), (1, 1), (64, 32)])
@pytest.mark.parametrize("start", [3, END])
def test_every_window_begins_with_the_start_token_which_is_not_counted(size, stride, start):
    """The documents hold the start token, unless it is the end token, which precedes each already."""
    texts = Texts()
    bare = texts.each
    texts.each = [ids if start == END else [start, *ids] for ids in bare]
    texts.document_lengths = lambda: np.array([[len(ids), 3] for ids in texts.each])
    evaluated = SlidingWindow(texts, VOCAB, END, size, stride, 2, start_of_document=start)
    rows = evaluated.evaluate(SumsContext(), Rank(), nullcontext, multiple=4)
    assert [(row.tokens, row.bytes) for row in rows] == [(length, 3) for length in LENGTHS]
    for row, document in zip(rows, bare, strict=True):
        assert row.nats == pytest.approx(by_hand(document, size, stride, start), rel=1e-5)  # float32


def test_a_stride_of_one_gives_every_token_a_full_window():
    assert all(window.end - window.start == 6 for window in sliding_windows([30], 6, 1))
    assert sum(window.counted for window in sliding_windows([30], 6, 1)) == 30


def test_the_totals_of_ranks_add_up():
    texts, size = Texts(), 3
    whole = SlidingWindow(texts, VOCAB, END, 6, 2, 2).evaluate(SumsContext(), Rank(), nullcontext)
    shares = [
        SlidingWindow(texts, VOCAB, END, 6, 2, 2).evaluate(SumsContext(), Rank(rank, size), nullcontext)
        for rank in range(size)
    ]
    summed = [sum(share[document].nats for share in shares) for document in range(len(LENGTHS))]
    assert summed == pytest.approx([row.nats for row in whole], rel=1e-6)


def test_only_the_first_documents():
    rows = SlidingWindow(Texts(), VOCAB, END, 6, 3, 2, limit=4).evaluate(SumsContext(), Rank(), nullcontext)
    assert [row.tokens for row in rows] == list(LENGTHS[:4])


@pytest.mark.parametrize("stride", [0, 7])
def test_a_stride_that_would_skip_or_stand_still_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        SlidingWindow(Texts(), VOCAB, END, 6, stride, 2)


def test_an_invalid_document_is_reported_after_the_last_forward_pass():
    class Bad(Texts):
        def tokens(self, start, count):
            if start >= 12:
                raise OSError(5, "Input/output error")
            return super().tokens(start, count)

    class Strange(Texts):
        def tokens(self, start, count):
            return super().tokens(start, count) + VOCAB

    for texts, said in ((Bad(), "Input/output error"), (Strange(), "outside the vocabulary of 11")):
        with pytest.raises(UnreadableError, match=said):
            SlidingWindow(texts, VOCAB, END, 6, 2, 2).evaluate(SumsContext(), Rank(), nullcontext)
