"""What keeps a router from sending all tokens to the same few experts, and how well that goes.

For each micro-batch by itself, and over all its tokens: training packs text, so there is no padding to leave out. A
token whose label is ignored is sent to experts like any other, and counts.

    load balancing   E sum_e f_e P_e, f_e the share of expert e in all that is sent, P_e its mean probability
                     (Fedus et al. 2021, arXiv 2101.03961, eqs. 4-6); 1 where experts share alike
    z loss           mean of log(sum_e exp(logit_e))^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5)

L layers, E experts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

Coefficient = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class RouterLossConfig:
    """[model.router]: what a router is trained for besides the loss of the tokens. Means over tokens and layers."""

    load_balancing_coefficient: Coefficient = 0.01
    """Of the load-balancing loss, which is 1 where all experts are sent equally much."""
    z_loss_coefficient: Coefficient = 0.001
    """Of the squared log-partition of the router's logits, which keeps them small."""


class SequenceReduce(Protocol):
    """A sum over the processes that hold the other tokens of the micro-batch."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor: ...


class RouterLoss(nn.Module):
    """Adds up what all layers tell of a micro-batch: its losses, and the numbers of a step."""

    def __init__(self, experts: int, config: RouterLossConfig) -> None:
        super().__init__()
        self.experts, self.config = experts, config
        self.sequence_reduce: SequenceReduce | None = None
        self._tokens_per_expert_LE: Tensor | None = None
        self._totals: Tensor | None = None

    def forward(self, sums: Sequence[Tensor]) -> Tensor:
        """The losses of a micro-batch, times their coefficients and summed over its tokens: (), float32.

        `sums` are the `models.moe.routing_sums` of each layer. Where processes share the tokens, it is this one's
        summand, and so are its gradients.
        """
        sums_LX = torch.stack(list(sums))
        tokens_per_expert_LE, probability_LE, z_L1, entropy_L1 = sums_LX.split(
            [self.experts, self.experts, 1, 1], dim=-1
        )
        tokens_per_expert_LE = tokens_per_expert_LE.detach()
        all_tokens_per_expert_LE = (
            tokens_per_expert_LE
            if self.sequence_reduce is None
            else self.sequence_reduce.all_reduce_sum(tokens_per_expert_LE.clone())
        )
        share_LE = all_tokens_per_expert_LE / all_tokens_per_expert_LE.sum(-1, keepdim=True)
        balance = self.experts * (share_LE * probability_LE).sum(-1).mean()
        z = z_L1.mean()
        tokens = probability_LE.detach()[0].sum()  # probabilities of a token add up to 1
        self._note(
            tokens_per_expert_LE, torch.stack([balance.detach(), z.detach(), entropy_L1.detach().mean(), tokens])
        )
        return self.config.load_balancing_coefficient * balance + self.config.z_loss_coefficient * z

    def pop_sums(self) -> Tensor | None:
        """What was noted since the last call, (L E + 4,) float64 on the device; None if nothing was."""
        if self._tokens_per_expert_LE is None or self._totals is None:
            return None
        sums = torch.cat([self._tokens_per_expert_LE.flatten(), self._totals])
        self._tokens_per_expert_LE = self._totals = None
        return sums

    def metrics_of(self, sums: Tensor) -> dict[str, float]:
        """By their names in metrics.jsonl, from `pop_sums` summed over all processes, on the CPU."""
        load_LE = sums[:-4].view(-1, self.experts)
        load_LE = load_LE / load_LE.mean(-1, keepdim=True)
        balance, z, entropy, tokens = sums[-4:].tolist()
        return {
            "load_balancing_loss": balance / tokens,
            "router_z_loss": z / tokens,
            "router_entropy": entropy / tokens,
            "expert_load_max": float(load_LE.max()),
            "expert_load_min": float(load_LE.min()),
        }

    def _note(self, tokens_per_expert_LE: Tensor, totals: Tensor) -> None:
        tokens_per_expert_LE, totals = tokens_per_expert_LE.double(), totals.double()
        self._tokens_per_expert_LE = (
            tokens_per_expert_LE
            if self._tokens_per_expert_LE is None
            else self._tokens_per_expert_LE + tokens_per_expert_LE
        )
        self._totals = totals if self._totals is None else self._totals + totals
