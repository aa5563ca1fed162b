"""Attention that stays within documents, for sequences that hold several of them end to end.

The token that ends documents is the last target of one and, as an input, the first token of the next. So every token is
predicted from its own document alone: the first one from the end token that stands before it, as where text is
generated from nothing, and no target crosses a boundary. A sequence that begins within a document starts there anew.

B batch, T sequence, N = B T tokens, n tokens of one document, H query heads, K key-value heads, C head width
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NARROWEST = 16
"""Channels of a head that flex attention's kernels take at the least."""


def document_positions(starts_BT: Tensor) -> Tensor:
    """(B, T) int64: tokens since the start of document or sequence; `starts_BT` is true where a document starts."""
    slots_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return slots_T - (slots_T * starts_BT).cummax(-1).values


def document_attention(starts_BT: Tensor, head_width: int) -> PerDocumentSDPA | FlexDocumentAttention:
    """What the tokens of a micro-batch attend to, found once for all layers; `starts_BT` as for `positions`.

    In blocks on a GPU, where Triton can compile a kernel for them; one by one elsewhere.
    """
    if starts_BT.is_cuda and head_width >= _NARROWEST and find_spec("triton") is not None:
        return FlexDocumentAttention(starts_BT)
    return PerDocumentSDPA(starts_BT)


class PerDocumentSDPA:
    """Every document as a sequence of its own: no mask in memory, and no product that a mask would throw away."""

    def __init__(self, starts_BT: Tensor) -> None:
        starts_BT = starts_BT.clone()
        starts_BT[:, 0] = True
        firsts = starts_BT.flatten().nonzero().flatten()
        self.lengths: list[int] = firsts.diff(append=firsts.new_tensor([starts_BT.numel()])).tolist()

    @torch.compiler.disable  # the lengths are others in every micro-batch, and each would be compiled for
    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, scale: float | None) -> Tensor:
        """What every query finds among the keys of its document up to its own, (B, H, T, C)."""
        parts = (x.flatten(0, 1).split(self.lengths) for x in (q_BTHC, k_BTKC, v_BTKC))
        grouped = q_BTHC.shape[2] != k_BTKC.shape[2]
        found = []
        for document in zip(*parts, strict=True):
            q_1HnC, k_1KnC, v_1KnC = (part.transpose(0, 1).unsqueeze(0) for part in document)
            out_1HnC = F.scaled_dot_product_attention(
                q_1HnC, k_1KnC, v_1KnC, is_causal=True, scale=scale, enable_gqa=grouped
            )
            found.append(out_1HnC.transpose(1, 2))
        return torch.cat(found, 1).view(q_BTHC.shape).transpose(1, 2)


class FlexDocumentAttention:
    """By flex attention (arXiv 2412.05496): squares of the score matrix that lie outside of documents are skipped."""

    def __init__(self, starts_BT: Tensor, *, compiled: bool = True) -> None:
        """Without `compiled` the whole score matrix is computed: for a look at the numbers without a GPU."""
        rows, length = starts_BT.shape
        document_BT = starts_BT.cumsum(-1)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document_BT[row, query] == document_BT[row, key])

        self._attention, make_mask = _flex_attention(compiled)
        self._mask = make_mask(sees, rows, None, length, length, device=starts_BT.device)

    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, scale: float | None) -> Tensor:
        """As `OneByOne.attend`."""
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
    """The attention, and what makes its mask. They are compiled once for each shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return flex_attention, create_block_mask
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
