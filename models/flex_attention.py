"""Flex attention (arXiv 2412.05496): fused kernels for documents, sliding windows and softcaps, which skip the blocks
of the score matrix that a mask excludes.

B batch, T sequence, H query heads, K key-value heads, C head width
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor

from models.attention import AttentionRule
from models.compilation import missing_for_gpu, raise_recompile_limit

_MIN_HEAD_WIDTH = 16
"""Smallest head width that the kernels support."""


def has_flex_attention(device: torch.device, head_width: int) -> bool:
    """Return whether flex attention has kernels: on a GPU for which they can be compiled."""
    return device.type == "cuda" and head_width >= _MIN_HEAD_WIDTH and missing_for_gpu() is None


class FlexAttention:
    """Causal attention within documents and sliding windows."""

    def __init__(
        self,
        document_BT: Tensor | None,
        length: int,
        device: torch.device,
        windows: Collection[int] = (0,),
        *,
        positions_t: Tensor | None = None,
        compiled: bool = True,
    ) -> None:
        """`document_BT` is the number of each token's document within its row; None: each sequence is one document.

        `windows` are those that `attend` will be called with. `positions_t` are the positions of the queries in the
        sequence of `length` keys; None: all of them. Without `compiled` the full score matrix is computed,
        which works without a GPU; for tests.
        """
        self._document_BT = document_BT
        rows = None if document_BT is None else len(document_BT)
        queries = length if positions_t is None else len(positions_t)
        self._attention, make_mask = _flex_attention(compiled)
        self._masks = {
            window: make_mask(_can_attend(document_BT, window, positions_t), rows, None, queries, length, device=device)
            for window in windows
        }

    def documents(self) -> Tensor | None:
        """Return (B, T) int64: the number of each token's document within its row; None if there are none."""
        return self._document_BT

    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, rule: AttentionRule) -> Tensor:
        """Return the attention output of every token over its document and window, (B, H, T, C)."""
        out_BHTC: Tensor = self._attention(
            q_BTHC.transpose(1, 2),
            k_BTKC.transpose(1, 2),
            v_BTKC.transpose(1, 2),
            score_mod=_bound(rule.softcap) if rule.softcap else None,
            block_mask=self._masks[rule.window],
            scale=rule.scale,
            enable_gqa=q_BTHC.shape[2] != k_BTKC.shape[2],
        )
        return out_BHTC


@cache
def sequence_attention(length: int, device: torch.device, windows: frozenset[int]) -> FlexAttention:
    """Return the attention over whole sequences of layers with these windows."""
    return FlexAttention(None, length, device, windows)


def _can_attend(
    document_BT: Tensor | None, window: int, positions_t: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # flex attention calls it with scalar indices, vectorized over the scores (B, H, t, T)
    def can_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query if positions_t is None else positions_t[query]
        allowed = query >= key
        if window:
            allowed = allowed & (query - key < window)
        if document_BT is not None:
            allowed = allowed & (document_BT[row, query] == document_BT[row, key])
        return allowed

    return can_attend


@cache  # one function for each cap, because flex attention is compiled for the identity of the function
def _bound(cap: float) -> Callable[..., Tensor]:
    def bound(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return bound


@cache
def _flex_attention(compiled: bool) -> tuple[Any, Any]:
    """Return flex attention and its block-mask constructor, compiled once for each shape if `compiled`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return flex_attention, create_block_mask
    raise_recompile_limit()
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
