"""Key-value cache for generation: each step computes only the new tokens.

All rows of a batch end at the same slot; shorter prompts are padded on the left. Positions of a row count from its
first token, and padding is masked, so a row computes the same as it would alone.

B batch, T new tokens, S slots, H query heads, K key-value heads, G = H / K, C head width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.presets import LlamaShape
from models.rope import rope_table


class KeyValueCache:
    """A cache of `capacity` tokens for each row, allocated once."""

    def __init__(
        self,
        shape: LlamaShape,
        rope_frequencies_C: Tensor,
        *,
        padding: Sequence[int],
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`padding` is the number of padding tokens of each row."""
        rows = len(padding)
        self.length = 0
        """Number of slots in use."""
        self.layers = [
            LayerCache(torch.empty(2, rows, shape.kv_heads, capacity, shape.head_width, device=device, dtype=dtype))
            for _ in range(shape.layers)
        ]
        self._rope = rope_table(capacity, rope_frequencies_C).unsqueeze(1)  # (2, 1, S, 1, C)
        self._valid_BS: Tensor | None = None
        if any(padding):
            first_B1 = torch.tensor(padding, device=device).unsqueeze(-1)
            slots_S = torch.arange(capacity, device=device)
            self._valid_BS = slots_S >= first_B1
            self._rope = self._rope[:, 0, (slots_S - first_B1).clamp(min=0)]  # (2, B, S, 1, C)

    def extend(self, tokens: int) -> Tensor:
        """Allocate the next `tokens` slots and return the RoPE table of their positions, (2, 1 or B, T, 1, C).

        Raises ValueError if the cache is full.
        """
        capacity = self._rope.shape[2]
        start, self.length = self.length, self.length + tokens
        if self.length > capacity:
            raise ValueError(f"{self.length} tokens exceed the capacity of the cache, {capacity}")
        mask = self._mask(start)
        for layer in self.layers:
            layer.start, layer.end, layer.mask = start, self.length, mask
        return self._rope[:, :, start : self.length]

    def _mask(self, start: int) -> Tensor | None:
        """Return the mask (B or 1, 1, T, S) of new tokens; None if they attend to all slots (T = 1) or causally (start
        = 0)."""
        end = self.length
        if end - start == 1:
            return None if self._valid_BS is None else self._valid_BS[:, None, None, :end]
        if start == 0 and self._valid_BS is None:
            return None
        slots_S = torch.arange(end, device=self._rope.device)
        new_T1 = slots_S[start:, None]
        mask_BTS = slots_S <= new_T1
        if self._valid_BS is not None:
            # Padding attends to itself: softmax over no slots would be nan, which would spread to the layers above.
            mask_BTS = mask_BTS & (self._valid_BS[:, None, :end] | (slots_S == new_T1))
        return mask_BTS.expand(-1, end - start, end).unsqueeze(1) if mask_BTS.dim() == 3 else mask_BTS[None, None]


class LayerCache:
    """The cache of one layer."""

    def __init__(self, both_2BKSC: Tensor) -> None:
        self.keys_BKSC, self.values_BKSC = both_2BKSC
        self.start = self.end = 0
        self.mask: Tensor | None = None

    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, scale: float | None) -> Tensor:
        """Store the new keys and values, and return the attention output over all stored ones, (B, H, T, C)."""
        self.keys_BKSC[:, :, self.start : self.end] = k_BTKC.transpose(1, 2)
        self.values_BKSC[:, :, self.start : self.end] = v_BTKC.transpose(1, 2)
        k_BKSC, v_BKSC = self.keys_BKSC[:, :, : self.end], self.values_BKSC[:, :, : self.end]
        rows, tokens, heads, width = q_BTHC.shape
        if tokens > 1:
            return F.scaled_dot_product_attention(
                q_BTHC.transpose(1, 2),
                k_BKSC,
                v_BKSC,
                attn_mask=self.mask,
                is_causal=self.mask is None,
                scale=scale,
                enable_gqa=heads != k_BKSC.shape[1],
            )
        # T = 1: treat the G query heads that share a key-value head as a dimension of tokens, so that no key is
        # repeated.
        q_BKGC = q_BTHC.view(rows, k_BKSC.shape[1], -1, width)
        out_BKGC = F.scaled_dot_product_attention(q_BKGC, k_BKSC, v_BKSC, attn_mask=self.mask, scale=scale)
        return out_BKGC.view(rows, heads, 1, width)
