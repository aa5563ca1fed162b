"""Key-value cache for generation: each step computes only the new tokens.

All rows of a batch end at the same slot; shorter prompts are padded on the left. Positions of a row count from its
first token, and padding is masked, so a row computes the same as it would alone, except with dynamic scaling of RoPE,
whose frequencies are those of the capacity.

B batch, T new tokens, S slots, H query heads, K key-value heads, G = H / K, C head width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention import AttentionRule, causal_attention, masked_attention
from models.presets import LlamaShape


class KeyValueCache:
    """A cache of `capacity` tokens for each row, allocated once. A layer with a sliding window keeps only a window."""

    def __init__(
        self,
        shape: LlamaShape,
        ropes: Sequence[Tensor],
        *,
        padding: Sequence[int],
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`ropes` are RoPE tables of `capacity` positions; `padding` is the number of padding tokens of each row."""
        self.length, self.capacity = 0, capacity
        first_B1 = first_tokens(padding, device)
        self._ropes = [rope_of_rows(rope, first_B1) for rope in ropes]
        windows = [min(capacity, shape.window_of(layer) or capacity) for layer in range(shape.layers)]
        self._slots = {window: _Slots(window, first_B1, device) for window in windows}
        self.layers = [
            LayerCache(
                torch.empty(2, len(padding), shape.kv_heads, window, shape.head_width, device=device, dtype=dtype),
                self._slots[window],
            )
            for window in windows
        ]

    def local(self, tokens_BT: Tensor) -> Tensor:
        """Return the new tokens that this process computes: all of them."""
        return tokens_BT

    def last(self, x_BTD: Tensor) -> Tensor:
        """Return the last of the new tokens, (B, 1, D)."""
        return x_BTD[:, -1:]

    def extend(self, tokens: int) -> list[Tensor]:
        """Make room for `tokens` new tokens and return the RoPE tables of their positions, (2, 1 or B, T, 1, R).

        Raises ValueError if the cache is full.
        """
        start, self.length = self.length, self.length + tokens
        if self.length > self.capacity:
            raise ValueError(f"{self.length} tokens exceed the capacity of the cache, {self.capacity}")
        for slots in self._slots.values():
            slots.extend(start, self.length)
        return [rope[:, :, start : self.length] for rope in self._ropes]


def first_tokens(padding: Sequence[int], device: torch.device) -> Tensor | None:
    """Return (B, 1): the index of each row's first token that is not padding; None if there is no padding."""
    return torch.tensor(padding, device=device).unsqueeze(-1) if any(padding) else None


def rope_of_rows(rope: Tensor, first_B1: Tensor | None) -> Tensor:
    """Return the RoPE table of each row, (2, 1 or B, S, 1, R), whose positions count from its first token.

    `rope` is the table of S positions, (2, S, 1, R), and `first_B1` that of `first_tokens`.
    """
    if first_B1 is None:
        return rope.unsqueeze(1)
    positions_BS = (torch.arange(rope.shape[1], device=rope.device) - first_B1).clamp(min=0)
    return rope[:, positions_BS]


class _Slots:
    """Where the layers with the same window store the new tokens, and what those attend to.

    Token t is stored in slot t modulo `count`, the window: what it overwrites, no later token attends to.
    """

    def __init__(self, count: int, first_B1: Tensor | None, device: torch.device) -> None:
        """`first_B1` is the index of each row's first token that is not padding; None if there is no padding."""
        self.count, self.first_B1, self.device = count, first_B1, device

    def extend(self, start: int, end: int) -> None:
        """Take the tokens from `start` to `end` as the new ones."""
        count, tokens = self.count, end - start
        self.is_prompt = start == 0 and self.first_B1 is None
        """Whether the new tokens are all that there are, without padding."""
        self.used = min(end, count)
        self.stored: slice | Tensor
        """The slots of the new tokens, or of the last of them."""
        if end <= count or tokens == 1:
            self.stored = slice(start % count, start % count + tokens)
        else:
            self.stored = torch.arange(max(start, end - count), end, device=self.device) % count
        self.earlier: Tensor | None = None
        """The slots of the tokens before `start`, in order, if new ones overwrite tokens that new ones attend to."""
        if tokens > 1 and end > count:
            self.earlier = torch.arange(max(start - count, 0), start, device=self.device) % count
        self.mask: Tensor | None = None
        """The mask (B or 1, 1, T, S) of the tokens that each new one attends to; None: all."""
        if not self.is_prompt and (tokens > 1 or self.first_B1 is not None):
            self.mask = self._mask(start, end)

    def _mask(self, start: int, end: int) -> Tensor:
        if self.earlier is not None:
            tokens_S = torch.arange(start - len(self.earlier), end, device=self.device)
        else:  # the latest token in each slot
            slots_S = torch.arange(self.used, device=self.device)
            tokens_S = slots_S if end <= self.count else end - 1 - (end - 1 - slots_S) % self.count
        distance_TS = torch.arange(start, end, device=self.device).unsqueeze(-1) - tokens_S
        mask_TS = (distance_TS >= 0) & (distance_TS < self.count)
        if self.first_B1 is None:
            return mask_TS[None, None]
        # Padding attends to itself: softmax over no slots would be nan, which would spread to the layers above.
        return (mask_TS & ((tokens_S >= self.first_B1).unsqueeze(1) | (distance_TS == 0))).unsqueeze(1)


class LayerCache:
    """The keys and values of one layer."""

    def __init__(self, both_2BKSC: Tensor, slots: _Slots) -> None:
        self.keys_BKSC, self.values_BKSC = both_2BKSC
        self.slots = slots

    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, rule: AttentionRule) -> Tensor:
        """Store the new keys and values, and return the attention output over all stored ones, (B, H, T, C)."""
        slots, (rows, tokens, heads, width) = self.slots, q_BTHC.shape
        k_BKTC, v_BKTC = k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2)
        k_BKSC, v_BKSC = self.keys_BKSC[:, :, : slots.used], self.values_BKSC[:, :, : slots.used]
        if slots.earlier is not None:
            k_BKSC = torch.cat((self.keys_BKSC[:, :, slots.earlier], k_BKTC), 2)
            v_BKSC = torch.cat((self.values_BKSC[:, :, slots.earlier], v_BKTC), 2)
        self.keys_BKSC[:, :, slots.stored] = k_BKTC[:, :, -slots.count :]
        self.values_BKSC[:, :, slots.stored] = v_BKTC[:, :, -slots.count :]
        if slots.is_prompt:
            return causal_attention(q_BTHC.transpose(1, 2), k_BKTC, v_BKTC, rule)
        if tokens > 1:
            return masked_attention(q_BTHC.transpose(1, 2), k_BKSC, v_BKSC, slots.mask, rule)
        # T = 1: the G query heads that share a key-value head are a dimension of tokens, so that no key is repeated
        q_BKGC = q_BTHC.view(rows, k_BKSC.shape[1], -1, width)
        return masked_attention(q_BKGC, k_BKSC, v_BKSC, slots.mask, rule).view(rows, heads, 1, width)
