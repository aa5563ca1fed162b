"""Intra-document attention, for sequences that pack several documents.

A document begins with its start token. Without one, the end-of-document token is the last target of one document and,
as an input, the first token of the next. So every token is predicted from its document alone, the first one from the
start or end token before it, as in generation without a prompt. The beginning of a sequence is the start of a document
too, also in the middle of one.

B batch, T sequence, N = B T tokens, n tokens of one document, H query heads, K key-value heads, C head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.attention import AttentionRule, causal_attention


def document_positions(starts_BT: Tensor) -> Tensor:
    """Return (B, T) int64: the position of each token in its document. `starts_BT` is true where a document starts."""
    slots_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    # cummax carries the index of the latest start forward: (B, T)
    return slots_T - (slots_T * starts_BT).cummax(-1).values


class PerDocumentAttention:
    """Causal attention, one call per document: no mask in memory, and no products that a mask would discard."""

    def __init__(self, documents_BT: Tensor) -> None:
        """`documents_BT` is the number of each token's document within its row."""
        self._documents_BT = documents_BT
        starts_BT = documents_BT.diff(prepend=documents_BT[:, :1] - 1, dim=-1) != 0
        firsts = starts_BT.flatten().nonzero().flatten()  # (documents,), indices into the N tokens
        self.lengths: list[int] = firsts.diff(append=firsts.new_tensor([starts_BT.numel()])).tolist()

    def documents(self) -> Tensor:
        """Return (B, T) int64: the number of each token's document within its row."""
        return self._documents_BT

    @torch.compiler.disable  # the lengths differ in every micro-batch, and each would be compiled
    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, rule: AttentionRule) -> Tensor:
        """Return the attention output of every token over its document up to itself, (B, H, T, C)."""
        # (B, T, H, C) -> (N, H, C) -> one (n, H, C) for each document
        parts = (x.flatten(0, 1).split(self.lengths) for x in (q_BTHC, k_BTKC, v_BTKC))
        outputs = []
        for document in zip(*parts, strict=True):
            q_1HnC, k_1KnC, v_1KnC = (part.transpose(0, 1).unsqueeze(0) for part in document)
            outputs.append(causal_attention(q_1HnC, k_1KnC, v_1KnC, rule).transpose(1, 2))
        # (1, N, H, C) -> (B, T, H, C) -> (B, H, T, C)
        return torch.cat(outputs, 1).view(q_BTHC.shape).transpose(1, 2)
