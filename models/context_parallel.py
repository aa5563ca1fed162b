"""Attention of a context-parallel rank: it has some chunks of every sequence, and gathers the keys and values of all.

B batch, T sequence, t tokens of this rank, S keys, H query heads, K key-value heads, C head width
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from models.attention import AttentionRule, causal_attention, masked_attention
from models.flex_attention import FlexAttention

_QUERIES = 256
"""Queries of a sequence that attend at a time where no kernel has a causal mask for fewer queries than keys."""


class SequenceShards(Hashable, Protocol):
    """The ranks that hold the chunks of the sequences; see components/distributed/context_parallel.py."""

    rank: int
    size: int
    """Number of ranks."""

    def chunks(self, length: int) -> tuple[int, int, int]:
        """Return the starts of this rank's two chunks of a sequence of `length` tokens, and their length."""
        ...

    def shard(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's chunks of a tensor that has whole sequences along `dim`."""
        ...

    def gather(self, local: Tensor) -> Tensor:
        """Return the whole sequences, (B, t, ...) -> (B, T, ...); the gradient is summed over the ranks."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place, and return it."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, (n, ...), without a gradient."""
        ...


class ContextParallelAttention:
    """Attention of this rank's queries over the keys and values of all ranks."""

    def __init__(self, shards: SequenceShards, inner: ChunkAttention | FlexAttention) -> None:
        """`inner` attends with the queries of this rank's chunks, given all keys and values."""
        self._shards, self._inner = shards, inner

    def attend(self, q_BtHC: Tensor, k_BtKC: Tensor, v_BtKC: Tensor, rule: AttentionRule) -> Tensor:
        """Return the attention output of this rank's tokens, (B, H, t, C)."""
        # one collective for both
        k_BTKC, v_BTKC = self.gather(torch.cat((k_BtKC, v_BtKC), -1)).split(k_BtKC.shape[-1], -1)
        return self._inner.attend(q_BtHC, k_BTKC, v_BTKC, rule)

    def gather(self, local: Tensor) -> Tensor:
        """Return the whole sequences of queries, keys or values, (B, t, H or K, C) -> (B, T, H or K, C)."""
        return self._shards.gather(local)

    def documents(self) -> Tensor | None:
        """Return (B, T) int64: the number of each token's document within its row; None if there are none."""
        return self._inner.documents()


def whole_output(shards: SequenceShards, local: Tensor) -> Tensor:
    """Return the logits (B, T, V) of whole sequences, given those of this rank's tokens, or the sum of their losses,
    given this rank's. The gradient of a loss is that of this rank's summand."""
    if local.ndim:
        return shards.gather(local)
    return local + (shards.all_reduce_sum(local.detach().clone()) - local.detach())


def context_parallel_attention(
    shards: SequenceShards,
    documents_BT: Tensor | None,
    length: int,
    device: torch.device,
    windows: frozenset[int],
    *,
    flex: bool,
) -> ContextParallelAttention:
    """Return the attention of a micro-batch of whole sequences of `length` tokens, which all layers share.

    `documents_BT` is the number of each token's document within its row; None: each sequence is one document.
    """
    if not flex:
        return ContextParallelAttention(shards, ChunkAttention(shards.chunks(length), documents_BT))
    if documents_BT is None:
        return ContextParallelAttention(shards, _flex_attention_of_chunks(shards, length, device, windows))
    positions_t = shards.shard(torch.arange(length, device=device), 0)
    return ContextParallelAttention(
        shards, FlexAttention(documents_BT, length, device, windows, positions_t=positions_t)
    )


@cache
def _flex_attention_of_chunks(
    shards: SequenceShards, length: int, device: torch.device, windows: frozenset[int]
) -> FlexAttention:
    positions_t = shards.shard(torch.arange(length, device=device), 0)
    return FlexAttention(None, length, device, windows, positions_t=positions_t)


class ChunkAttention:
    """Causal attention of two chunks over their sequences and documents, where flex attention has no kernels."""

    def __init__(self, chunks: tuple[int, int, int], documents_BT: Tensor | None) -> None:
        """`chunks` are those of `SequenceShards.chunks`."""
        first, second, chunk = chunks
        self._documents_BT = documents_BT
        self._masks: dict[tuple[int, bool], Tensor] = {}
        bounds = ((first, first + chunk), (second, second + chunk))
        # for all rows, or for each row by itself: start and end of queries, and of their keys
        self._parts: list[list[tuple[slice, slice]]] = []
        if documents_BT is None:
            self._parts.append([(slice(start, end), slice(0, end)) for start, end in bounds])
            return
        for numbers in documents_BT.tolist():
            starts = [at for at, number in enumerate(numbers) if at == 0 or number != numbers[at - 1]]
            documents = list(zip(starts, [*starts[1:], len(numbers)], strict=True))
            self._parts.append([
                (slice(max(start, begin), min(end, stop)), slice(begin, min(end, stop)))
                for start, end in bounds
                for begin, stop in documents
                if max(start, begin) < min(end, stop)
            ])  # fmt: skip

    def documents(self) -> Tensor | None:
        """Return (B, T) int64: the number of each token's document within its row; None if there are none."""
        return self._documents_BT

    @torch.compiler.disable  # the lengths of documents differ in every micro-batch, and each would be compiled
    def attend(self, q_BtHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, rule: AttentionRule) -> Tensor:
        """Return the attention output of this rank's tokens, (B, H, t, C)."""
        q_BHtC, k_BHTC, v_BHTC = (x.transpose(1, 2) for x in (q_BtHC, k_BTKC, v_BTKC))
        if (groups := q_BHtC.shape[1] // k_BHTC.shape[1]) > 1:
            # once: with fewer heads every call would copy its keys and values, and autograd would keep the copies
            k_BHTC, v_BHTC = (x.repeat_interleave(groups, 1) for x in (k_BHTC, v_BHTC))
        rows = []
        for number, parts in enumerate(self._parts):
            row = slice(None) if self._documents_BT is None else slice(number, number + 1)
            outputs, done = [], 0
            for queries, keys in parts:
                count = queries.stop - queries.start
                q = q_BHtC[row, :, done : done + count]
                outputs.append(self._attend_last(q, k_BHTC[row, :, keys], v_BHTC[row, :, keys], rule))
                done += count
            rows.append(torch.cat(outputs, 2))
        return torch.cat(rows)

    def _attend_last(self, q_BHQC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, rule: AttentionRule) -> Tensor:
        """Return the attention output (B, H, Q, C) of the last Q of S positions."""
        queries, keys = q_BHQC.shape[2], k_BHSC.shape[2]
        if queries == keys:
            return causal_attention(q_BHQC, k_BHSC, v_BHSC, rule)
        outputs = []
        for start in range(0, queries, _QUERIES):
            q = q_BHQC[:, :, start : start + _QUERIES]
            end = keys - queries + start + q.shape[2]
            first = max(0, end - q.shape[2] + 1 - rule.window) if rule.window else 0
            mask = self._mask(q, end - first, rule)
            outputs.append(masked_attention(q, k_BHSC[:, :, first:end], v_BHSC[:, :, first:end], mask, rule))
        return torch.cat(outputs, 2)

    def _mask(self, q_BHQC: Tensor, keys: int, rule: AttentionRule) -> Tensor:
        """Return the mask (Q, keys) of the last Q of `keys` positions.

        It is a part of a mask that is made once: autograd keeps it, and copies would be as large as the logits.
        """
        queries, key = q_BHQC.shape[2], (rule.window, bool(rule.softcap))
        mask = self._masks.get(key)
        if mask is None:
            most = max(each.stop - each.start for parts in self._parts for _, each in parts)
            if rule.window:
                most = min(most, rule.window + _QUERIES)
            # position of a query minus that of a key, both counted from the end
            distance = torch.arange(most).flip(0) - torch.arange(_QUERIES).flip(0).unsqueeze(1)
            mask = (distance >= 0) & (distance < (rule.window or most))
            if not rule.softcap:  # a mask of booleans would be converted, and the copy kept, in every call
                mask = torch.zeros(mask.shape, dtype=q_BHQC.dtype).masked_fill_(~mask, -torch.inf)
            self._masks[key] = mask = mask.to(q_BHQC.device)
        return mask[-queries:, -keys:]
