"""Intra-document attention, for sequences that pack several documents.

A document begins with its start token. Without one, the end-of-document token is the last target of one document and,
as an input, the first token of the next. So every token is predicted from its document alone, the first one from the
start or end token before it, as in generation without a prompt. The beginning of a sequence is the start of a document
too, also in the middle of one.

B batch, T sequence, N = B T tokens, n tokens of one document, H query heads, K key-value heads, C head width
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_FLEX_HEAD_WIDTH = 16
"""Smallest head width that the kernels of flex attention support."""


def document_positions(starts_BT: Tensor) -> Tensor:
    """Return (B, T) int64: the position of each token in its document. `starts_BT` is true where a document starts."""
    slots_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    # cummax carries the index of the latest start forward: (B, T)
    return slots_T - (slots_T * starts_BT).cummax(-1).values


def document_attention(starts_BT: Tensor, head_width: int) -> PerDocumentSDPA | FlexDocumentAttention:
    """Return the attention of a micro-batch, which all layers share; `starts_BT` as in `document_positions`.

    Flex attention on a GPU where Triton is installed, one call per document elsewhere.
    """
    if starts_BT.is_cuda and head_width >= _MIN_FLEX_HEAD_WIDTH and find_spec("triton") is not None:
        return FlexDocumentAttention(starts_BT)
    return PerDocumentSDPA(starts_BT)


class PerDocumentSDPA:
    """Causal attention, one call per document: no mask in memory, and no products that a mask would discard."""

    def __init__(self, starts_BT: Tensor) -> None:
        starts_BT = starts_BT.clone()
        starts_BT[:, 0] = True  # the beginning of a sequence starts a document too
        self._starts_BT = starts_BT
        firsts = starts_BT.flatten().nonzero().flatten()  # (documents,), indices into the N tokens
        self.lengths: list[int] = firsts.diff(append=firsts.new_tensor([starts_BT.numel()])).tolist()

    def documents(self) -> Tensor:
        """Return (B, T) int64: the number of each token's document within its row."""
        return self._starts_BT.cumsum(-1)

    @torch.compiler.disable  # the lengths differ in every micro-batch, and each would be compiled
    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, scale: float | None) -> Tensor:
        """Return the attention output of every token over its document up to itself, (B, H, T, C)."""
        # (B, T, H, C) -> (N, H, C) -> one (n, H, C) for each document
        parts = (x.flatten(0, 1).split(self.lengths) for x in (q_BTHC, k_BTKC, v_BTKC))
        grouped = q_BTHC.shape[2] != k_BTKC.shape[2]
        outputs = []
        for document in zip(*parts, strict=True):
            q_1HnC, k_1KnC, v_1KnC = (part.transpose(0, 1).unsqueeze(0) for part in document)
            out_1HnC = F.scaled_dot_product_attention(
                q_1HnC, k_1KnC, v_1KnC, is_causal=True, scale=scale, enable_gqa=grouped
            )
            outputs.append(out_1HnC.transpose(1, 2))
        # (1, N, H, C) -> (B, T, H, C) -> (B, H, T, C)
        return torch.cat(outputs, 1).view(q_BTHC.shape).transpose(1, 2)


class FlexDocumentAttention:
    """Flex attention (arXiv 2412.05496), which skips the blocks of the score matrix that lie outside of documents."""

    def __init__(self, starts_BT: Tensor, *, compiled: bool = True) -> None:
        """Without `compiled` the full score matrix is computed, which works without a GPU; for tests."""
        rows, length = starts_BT.shape
        self._document_BT = document_BT = starts_BT.cumsum(-1)  # index of each token's document within its row

        # flex attention calls it with scalar indices, vectorized over the scores (B, H, T, T)
        def can_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document_BT[row, query] == document_BT[row, key])

        self._attention, make_mask = _flex_attention(compiled)
        self._mask = make_mask(can_attend, rows, None, length, length, device=starts_BT.device)

    def documents(self) -> Tensor:
        """See `PerDocumentSDPA.documents`."""
        return self._document_BT

    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, scale: float | None) -> Tensor:
        """See `PerDocumentSDPA.attend`."""
        out_BHTC: Tensor = self._attention(
            q_BTHC.transpose(1, 2),
            k_BTKC.transpose(1, 2),
            v_BTKC.transpose(1, 2),
            block_mask=self._mask,
            scale=scale,
            enable_gqa=q_BTHC.shape[2] != k_BTKC.shape[2],
        )
        return out_BHTC


@cache
def _flex_attention(compiled: bool) -> tuple[Any, Any]:
    """Return flex attention and its block-mask constructor, compiled once for each shape if `compiled`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return flex_attention, create_block_mask
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
