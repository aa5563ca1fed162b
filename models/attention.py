"""Causal self-attention with grouped queries (GQA, arXiv 2305.13245), and its variants.

Each variant is a key of `Llama` (llama.py), which describes it; docs/models.md has the sources.

B batch, T queries, S keys, D model width, H query heads, K key-value heads, G = H / K, C head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norm import RMSNorm
from models.presets import LlamaShape
from models.rope import apply_rope

_MIN_CHUNK = 64
"""Smallest chunk of queries of a sliding window."""


@dataclass(frozen=True, kw_only=True)
class AttentionRule:
    """What the queries of a layer do with the keys before them."""

    scale: float | None = None
    """Factor on the logits q.k; None: 1 / sqrt(C)."""
    window: int = 0
    """Number of tokens that a query attends to, its own included; 0: all before it."""
    softcap: float = 0.0
    """Bound of the logits: cap * tanh(logit / cap); 0: none."""


class AttentionBackend(Protocol):
    """Attention other than that over one whole sequence."""

    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, rule: AttentionRule) -> Tensor:
        """Return the attention output, (B, H, T, C)."""
        ...


class Attention(nn.Module):
    """Causal self-attention of one layer, with the variants that the shape names."""

    def __init__(self, shape: LlamaShape, layer: int) -> None:
        super().__init__()
        self.head_width, self.qk_norm = shape.head_width, shape.qk_norm
        q_width, kv_width = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        # muP uses 1 / C and not 1 / sqrt(C): trained q and k correlate, so q.k grows like C.
        scale = shape.attention_scale or (None if shape.mup is None else 1 / shape.head_width)
        self.rule = AttentionRule(scale=scale, window=shape.window_of(layer), softcap=shape.attention_softcap)
        self.wq = nn.Linear(shape.dim, q_width, bias=shape.qkv_bias)
        self.wk = nn.Linear(shape.dim, kv_width, bias=shape.qkv_bias)
        self.wv = nn.Linear(shape.dim, kv_width, bias=shape.qkv_bias)
        self.wo = nn.Linear(q_width, shape.dim, bias=False)
        self.wg = nn.Linear(shape.dim, q_width, bias=False) if shape.gated_attention else None
        if shape.qk_norm != "off":
            widths = (q_width, kv_width) if shape.qk_norm == "all_heads" else (shape.head_width, shape.head_width)
            self.q_norm, self.k_norm = (RMSNorm.of(shape, width) for width in widths)

    def queries_and_keys(self, x_BTD: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the queries (B, T, H, C) and keys (B, T, K, C), rotated to their positions."""
        if self.qk_norm == "off":
            return self._heads(self.wq(x_BTD), rope), self._heads(self.wk(x_BTD), rope)
        return self._heads(self.wq(x_BTD), rope, self.q_norm), self._heads(self.wk(x_BTD), rope, self.k_norm)

    def _heads(self, x: Tensor, rope: Tensor | None, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        if norm is not None and self.qk_norm == "all_heads":
            x = norm(x)
        # -1: the number of heads is read from the tensor, because a TP rank holds only some of them
        x_BTHC = x.unflatten(-1, (-1, self.head_width))
        if norm is not None and self.qk_norm == "per_head":
            x_BTHC = norm(x_BTHC)
        x_BTHC = apply_rope(x_BTHC, rope)
        return norm(x_BTHC) if norm is not None and self.qk_norm == "per_head_after_rope" else x_BTHC

    def forward(self, x_BTD: Tensor, rope: Tensor | None, backend: AttentionBackend | None = None) -> Tensor:
        """Return (B, T, D). `rope` is None in a layer without rotary embedding, `backend` for one whole sequence."""
        q_BTHC, k_BTKC = self.queries_and_keys(x_BTD, rope)
        v_BTKC = self._heads(self.wv(x_BTD), None)
        if backend is None:
            out_BHTC = causal_attention(
                q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2), self.rule
            )
        else:
            out_BHTC = backend.attend(q_BTHC, k_BTKC, v_BTKC, self.rule)
        out_BTX = out_BHTC.transpose(1, 2).flatten(2)
        if self.wg is not None:
            out_BTX = out_BTX * self.wg(x_BTD).sigmoid()
        out_BTD: Tensor = self.wo(out_BTX)
        return out_BTD


def causal_attention(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, rule: AttentionRule) -> Tensor:
    """Return the attention output (B, H, T, C) of a whole sequence."""
    if 0 < rule.window < q_BHTC.shape[2]:
        return _sliding_window_attention(q_BHTC, k_BKTC, v_BKTC, rule)
    return masked_attention(q_BHTC, k_BKTC, v_BKTC, None, rule, is_causal=True)


def masked_attention(
    q_BHTC: Tensor,
    k_BKSC: Tensor,
    v_BKSC: Tensor,
    mask: Tensor | None,
    rule: AttentionRule,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Return the attention output (B, H, T, C) over the keys that `mask` allows, (T, S) or (B or 1, 1, T, S); None: all
    of them, with `is_causal` those up to the query. The window of `rule` is not applied.
    """
    if not rule.softcap:
        return F.scaled_dot_product_attention(
            q_BHTC,
            k_BKSC,
            v_BKSC,
            attn_mask=mask,
            is_causal=is_causal,
            scale=rule.scale,
            enable_gqa=q_BHTC.shape[1] != k_BKSC.shape[1],
        )
    # no kernel of this function bounds the logits, so all of them exist at once
    q_BKGTC = q_BHTC.unflatten(1, (k_BKSC.shape[1], -1))
    scale = q_BHTC.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    logits_BKGTS = softcap(q_BKGTC @ k_BKSC.unsqueeze(2).transpose(-1, -2) * scale, rule.softcap)
    if is_causal:
        mask = torch.ones(logits_BKGTS.shape[-2:], dtype=torch.bool, device=q_BHTC.device).tril()
    if mask is not None:
        logits_BKGTS = logits_BKGTS.masked_fill(~(mask.unsqueeze(2) if mask.dim() == 4 else mask), -torch.inf)
    exact = torch.promote_types(q_BHTC.dtype, torch.float32)
    p_BKGTS = logits_BKGTS.softmax(-1, dtype=exact).to(v_BKSC.dtype)
    return (p_BKGTS @ v_BKSC.unsqueeze(2)).flatten(1, 2)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(x / cap): x bounded by `cap` (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(x / cap)


def _sliding_window_attention(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, rule: AttentionRule) -> Tensor:
    """Return the attention output (B, H, T, C) of windows shorter than the sequence.

    The queries are cut into chunks of at least a window, which attend to their chunk and the one before: 2 T c products
    instead of T T for chunks of c tokens. `n` is the number of chunks after the first.
    """
    length, chunk = q_BHTC.shape[2], max(rule.window, _MIN_CHUNK)
    distance_cS = torch.arange(chunk, device=q_BHTC.device).unsqueeze(1) - torch.arange(
        -chunk, chunk, device=q_BHTC.device
    )
    mask_cS = (distance_cS >= 0) & (distance_cS < rule.window)
    q, k, v = (x[:, :, :chunk] for x in (q_BHTC, k_BKTC, v_BKTC))
    out_BHcC = masked_attention(q, k, v, mask_cS[: q.shape[2], chunk : chunk + q.shape[2]], rule)
    if length <= chunk:
        return out_BHcC
    rest = -(-(length - chunk) // chunk)
    # pad at the end: what is padded comes after every query
    q, k, v = (F.pad(x, (0, 0, 0, (rest + 1) * chunk - length)) for x in (q_BHTC, k_BKTC, v_BKTC))
    # (B, H, T, C) -> (B n, H, c, C); keys and values in steps of a chunk: (B n, K, 2 c, C)
    q = q[:, :, chunk:].unflatten(2, (rest, chunk)).transpose(1, 2).flatten(0, 1)
    k, v = (x.unfold(2, 2 * chunk, chunk).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
    out = masked_attention(q, k, v, mask_cS, rule).unflatten(0, (-1, rest)).transpose(1, 2).flatten(2, 3)
    return torch.cat((out_BHcC, out[:, :, : length - chunk]), 2)
