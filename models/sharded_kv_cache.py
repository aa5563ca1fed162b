"""Key-value cache of a context-parallel rank: it has some tokens of every row, and together the ranks have all of them.

A prompt is cut as a training sequence is: each rank computes its chunks, with the keys and values of a layer gathered
for the time of its attention, and stores the keys and values of its own chunks. Every later token is computed by all
ranks and stored by one of them in turn. It attends to the stored tokens of each rank, and the partial results are
merged (as those of chunks of keys in flash decoding).

B batch, T tokens, t tokens of this rank, S slots, n ranks, K key-value heads, G query heads of each, C head width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention import AttentionRule, softcap
from models.context_parallel import ContextParallelAttention, SequenceShards, context_parallel_attention
from models.flex_attention import has_flex_attention
from models.kv_cache import first_tokens, rope_of_rows
from models.presets import LlamaShape


class ShardedKeyValueCache:
    """This rank's part of a cache of `capacity` tokens for each row. Layers with a sliding window keep everything."""

    def __init__(
        self,
        shape: LlamaShape,
        ropes: Sequence[Tensor],
        *,
        padding: Sequence[int],
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        shards: SequenceShards,
    ) -> None:
        """As `KeyValueCache`. `shards` are the ranks."""
        self.length, self.capacity, self.shards = 0, capacity, shards
        self.device = device
        self._flex = has_flex_attention(device, shape.head_width)
        self._windows = frozenset(shape.window_of(layer) for layer in range(shape.layers))
        self.first_B1 = first_tokens(padding, device)
        self._ropes = [rope_of_rows(rope, self.first_B1) for rope in ropes]
        self._size = (2, len(padding), shape.kv_heads, shape.head_width)
        self.layers = [ShardedLayerCache(self, dtype) for _ in range(shape.layers)]
        self.prompt: ContextParallelAttention | None = None
        """The attention of the prompt, while it is computed."""
        self.positions_S = torch.empty(0, dtype=torch.int64, device=device)
        """The positions of the tokens that this rank has stored, in the order of their slots."""

    def local(self, tokens_BT: Tensor) -> Tensor:
        """Return those of the new tokens that this rank computes: its chunks of the prompt, or a later token.

        Raises ValueError for a prompt that cannot be cut.
        """
        return self.shards.shard(tokens_BT) if self.length == 0 else tokens_BT

    def extend(self, tokens: int) -> list[Tensor]:
        """Make room for `tokens` new tokens: the prompt, then one at a time. Return the RoPE tables of those that this
        rank computes, (2, 1 or B, t, 1, R).

        Raises ValueError if the cache is full.
        """
        start, self.length = self.length, self.length + tokens
        if self.length > self.capacity:
            raise ValueError(f"{self.length} tokens exceed the capacity of the cache, {self.capacity}")
        new_ropes = [rope[:, :, start : self.length] for rope in self._ropes]
        if start == 0:
            positions_T = torch.arange(tokens, device=self.device)
            # padding is a document of its own, which no token of the text attends to
            documents_BT = None if self.first_B1 is None else (positions_T >= self.first_B1).long()
            self.prompt = context_parallel_attention(
                self.shards, documents_BT, tokens, self.device, self._windows, flex=self._flex
            )
            self.positions_S = self.shards.shard(positions_T, 0)
            return [self.shards.shard(rope, -3) for rope in new_ropes]
        if tokens > 1:
            raise ValueError("with context parallelism the tokens after the prompt are appended one at a time")
        self.prompt = None
        if start % self.shards.size == self.shards.rank:
            self.positions_S = torch.cat((self.positions_S, self.positions_S.new_tensor([start])))
        return new_ropes

    def last(self, x_BtD: Tensor) -> Tensor:
        """Return the last of the new tokens, (B, 1, D), which rank 0 has."""
        return x_BtD[:, -1:] if self.prompt is None else self.shards.all_gather(x_BtD[:, -1:])[0]

    def mask(self, window: int) -> Tensor | None:
        """Return (B or 1, 1, 1, S): the stored tokens that the latest token attends to; None: all."""
        mask_BS = None if self.first_B1 is None else self.positions_S >= self.first_B1
        if window:
            within_S = self.length - 1 - self.positions_S < window
            mask_BS = within_S.unsqueeze(0) if mask_BS is None else mask_BS & within_S
        return None if mask_BS is None else mask_BS[:, None, None]

    def new_slots(self, dtype: torch.dtype) -> Tensor:
        """Return memory for this rank's keys and values of one layer, (2, B, K, S, C)."""
        both, rows, heads, width = self._size
        later = -(-(self.capacity - self.length) // self.shards.size)
        return torch.empty(both, rows, heads, len(self.positions_S) + later, width, device=self.device, dtype=dtype)


class ShardedLayerCache:
    """This rank's keys and values of one layer."""

    def __init__(self, cache: ShardedKeyValueCache, dtype: torch.dtype) -> None:
        self._cache, self._dtype = cache, dtype
        self._both_2BKSC: Tensor | None = None
        self._stored = 0

    def attend(self, q_BtHC: Tensor, k_BtKC: Tensor, v_BtKC: Tensor, rule: AttentionRule) -> Tensor:
        """Store what is this rank's of the new keys and values; return the attention output of the new tokens over all
        stored ones, (B, H, t, C)."""
        cache = self._cache
        if self._both_2BKSC is None:  # at the prompt, whose length decides how much this rank will store
            self._both_2BKSC = cache.new_slots(self._dtype)
        count = len(cache.positions_S)
        if count > self._stored:
            new_2BKtC = torch.stack((k_BtKC, v_BtKC)).transpose(2, 3)
            self._both_2BKSC[:, :, :, self._stored : count] = new_2BKtC
            self._stored = count
        if cache.prompt is not None:
            return cache.prompt.attend(q_BtHC, k_BtKC, v_BtKC, rule)
        k_BKSC, v_BKSC = self._both_2BKSC[:, :, :, :count]
        q_BKGC = q_BtHC.squeeze(1).unflatten(1, (k_BKSC.shape[1], -1))
        part = attention_part(q_BKGC, k_BKSC, v_BKSC, cache.mask(rule.window), rule)
        out_BKGC = merge_attention(cache.shards.all_gather(part)).to(v_BKSC.dtype)
        return out_BKGC.flatten(1, 2).unsqueeze(2)


def attention_part(q_BKGC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, mask: Tensor | None, rule: AttentionRule) -> Tensor:
    """Return the attention of one token over some keys, before normalization: (B, K, G, C + 2) in float32 or more.

    The last two channels are the largest logit, and the sum of the weights exp(logit - largest).
    """
    exact = torch.promote_types(q_BKGC.dtype, torch.float32)
    scale = q_BKGC.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    # bf16 would round the logits, whose differences matter; fused kernels keep them in float32, too
    logits_BKGS = q_BKGC.to(exact) @ k_BKSC.to(exact).transpose(-1, -2) * scale
    if rule.softcap:
        logits_BKGS = softcap(logits_BKGS, rule.softcap)
    if mask is not None:
        logits_BKGS = logits_BKGS.masked_fill(~mask, -torch.inf)
    # a rank may have no key that the token attends to: then all weights are exp(-inf) = 0, not exp(-inf + inf)
    largest = logits_BKGS.amax(-1, keepdim=True).clamp(min=torch.finfo(exact).min)
    weights_BKGS = (logits_BKGS - largest).exp()
    values_BKGC = (weights_BKGS.to(v_BKSC.dtype) @ v_BKSC).to(exact)
    return torch.cat((values_BKGC, largest, weights_BKGS.sum(-1, keepdim=True)), -1)


def merge_attention(parts_nBKGC: Tensor) -> Tensor:
    """Return the attention output (B, K, G, C) over the keys of all of `attention_part`, (n, B, K, G, C + 2)."""
    values, largest, sums = parts_nBKGC.split([parts_nBKGC.shape[-1] - 2, 1, 1], -1)
    factors = (largest - largest.amax(0)).exp()
    return (values * factors).sum(0) / (sums * factors).sum(0)
