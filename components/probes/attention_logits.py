"""The attention of every layer: its largest logit, and its entropy.

Attention kernels return neither, so both are computed from queries and keys, for a bounded number of queries.

B batch, T sequence, Q sampled queries, H query heads, K key-value heads, G = H / K, C head width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from components.errors import InputError
from components.probes.groups import layers_of
from components.probes.probed_step import ProbedStep
from components.units import PositiveCount


class AttentionRule(Protocol):
    """What the logits of a layer are, as in models/attention.py."""

    scale: float | None
    """Factor on the logits; None: 1 / sqrt(C)."""
    window: int
    """Number of tokens that a query attends to, its own included; 0: all before it."""
    softcap: float
    """Bound of the logits: cap * tanh(logit / cap); 0: none."""


@runtime_checkable
class HasQueriesAndKeys(Protocol):
    """The `attention` of a block whose logits can be probed."""

    rule: AttentionRule

    def queries_and_keys(self, x_BTD: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (B, T, H, C) and (B, T, K, C), from the first two arguments of `forward`.

        A third one may have `documents()`, which returns (B, T): tokens with different numbers do not attend to each
        other. It may have `gather(x)`, which returns the whole sequences of queries or keys, of which this rank has a
        part.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AttentionLogits:
    """The largest logit and mean entropy, in nats, of each layer's attention, over all heads and some queries."""

    interval_steps: PositiveCount = 100
    """Steps between two measurements; the first step is measured."""
    sequences: PositiveCount = 8
    """The first sequences of the batch, on all ranks together, that are the sample."""
    queries: PositiveCount = 64
    """Queries of a sequence, at equal distances, of which the last token is one."""

    def check_model(self, model: nn.Module) -> None:
        for layer, block in layers_of(model).items():
            if not isinstance(getattr(block, "attention", None), HasQueriesAndKeys):
                raise InputError(
                    "use",
                    f"needs an `attention` with `rule` and `queries_and_keys(x, rope)` in every block, and "
                    f"{layer.replace('_', ' ')} of {type(model).__name__} has none; remove this probe",
                )

    def watch_forward(self, step: ProbedStep) -> Iterator[RemovableHandle]:
        for layer, block in layers_of(step.model).items():
            # runs after the hook that gathers the sequence of all TP ranks, which was registered before
            attention: nn.Module = block.attention  # type: ignore[assignment]
            yield attention.register_forward_pre_hook(self._record(step, layer))

    def _record(self, step: ProbedStep, layer: str) -> Any:
        def hook(attention: Any, inputs: tuple[Any, ...]) -> None:
            x_BTD, rope, *rest = inputs
            q_and_k = attention.queries_and_keys(x_BTD, rope)
            if rest and hasattr(rest[0], "gather"):
                q_and_k = (rest[0].gather(each) for each in q_and_k)
            q_BTHC, k_BTKC = (step.sample(each) for each in q_and_k)
            documents_BT = rest[0].documents() if rest and hasattr(rest[0], "documents") else None
            documents_BT = None if documents_BT is None else step.sample(documents_BT)
            at_Q = query_positions(q_BTHC.shape[1], self.queries, q_BTHC.device)
            largest, entropies = attention_statistics(q_BTHC, k_BTKC, at_Q, attention.rule, documents_BT)
            step.record_max(f"logit_max_{layer}", largest)
            step.record_mean(f"entropy_{layer}", entropies)

        return hook


def query_positions(length: int, queries: int, device: torch.device) -> Tensor:
    """Return (Q,) int64, at most `queries` positions of a sequence at equal distances; the last is that of its end."""
    count = min(length, queries)
    # on the device: a list would be copied to it with a synchronization
    return length * torch.arange(1, count + 1, device=device) // count - 1


def attention_statistics(
    q_BTHC: Tensor, k_BTKC: Tensor, at_Q: Tensor, rule: AttentionRule, documents_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each query, and its entropy in nats, both (B, K, G, Q), at least float32.

    `at_Q` are the positions of the queries. A query attends to the keys up to its position within the window of
    `rule`, with `documents_BT` only to those of its document. Logits are bounded by its softcap. One sequence is
    computed at a time: its logits are (K, G, Q, T).
    """
    exact = torch.promote_types(q_BTHC.dtype, torch.float32)
    distance_QT = at_Q.unsqueeze(1) - torch.arange(q_BTHC.shape[1], device=q_BTHC.device)
    visible_QT = distance_QT >= 0
    if rule.window:
        visible_QT = visible_QT & (distance_QT < rule.window)
    scale = q_BTHC.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    maxima, entropies = [], []
    for row in range(len(q_BTHC)):
        q_QKGC = q_BTHC[row, at_Q].to(exact).unflatten(1, (k_BTKC.shape[2], -1))
        logits_KGQT = torch.einsum("qkgc,tkc->kgqt", q_QKGC, k_BTKC[row].to(exact)) * scale
        if rule.softcap:
            logits_KGQT = rule.softcap * torch.tanh(logits_KGQT / rule.softcap)
        mask_QT = visible_QT
        if documents_BT is not None:
            mask_QT = mask_QT & (documents_BT[row, at_Q].unsqueeze(1) == documents_BT[row])
        logits_KGQT = logits_KGQT.masked_fill(~mask_QT, -torch.inf)
        log_p_KGQT = logits_KGQT.log_softmax(-1)
        maxima.append(logits_KGQT.amax(-1))
        entropies.append(-(log_p_KGQT.exp() * log_p_KGQT.masked_fill(~mask_QT, 0.0)).sum(-1))
    if not maxima:
        empty = q_BTHC.new_empty((0, k_BTKC.shape[2], 1, len(at_Q)), dtype=exact)
        return empty, empty
    return torch.stack(maxima), torch.stack(entropies)
