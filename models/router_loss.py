"""Auxiliary losses of the routers, which balance the load of the experts, and their metrics.

They are computed for each micro-batch over all its tokens: packed sequences have no padding, and a token whose label is
ignored is routed like any other.

    load balancing   E sum_e f_e P_e, with f_e the fraction of copies sent to expert e and P_e its mean probability
                     (Fedus et al. 2021, arXiv 2101.03961, eqs. 4-6); 1 if the load is balanced
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
    """[model.router]: auxiliary losses of the routers, as means over tokens and layers."""

    load_balancing_coefficient: Coefficient = 0.01
    """Coefficient of the load-balancing loss, which is 1 if the load is balanced."""
    z_loss_coefficient: Coefficient = 0.001
    """Coefficient of the z loss, the squared log-partition of the router logits, which keeps them small."""


class SequenceReduce(Protocol):
    """A sum over the processes that hold the other tokens of the micro-batch, in place."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor: ...


class RouterLoss(nn.Module):
    """Computes the auxiliary losses from the routing of all layers, and accumulates the metrics of a step."""

    def __init__(self, experts: int, config: RouterLossConfig) -> None:
        super().__init__()
        self.experts, self.config = experts, config
        self.sequence_reduces: list[SequenceReduce] = []
        """Sums over the tensor-parallel and the context-parallel ranks, which have other tokens of the micro-batch."""
        self._counts_LE: Tensor | None = None
        self._totals: Tensor | None = None

    def forward(self, sums: Sequence[Tensor]) -> Tensor:
        """Return the weighted losses of a micro-batch, summed over its tokens, () float32.

        `sums` are the `models.moe.routing_sums` of each layer. Under tensor or context parallelism the loss and its
        gradients are this rank's summands.
        """
        sums_LX = torch.stack(list(sums))
        counts_LE, probability_LE, z_L1, entropy_L1 = sums_LX.split([self.experts, self.experts, 1, 1], dim=-1)
        counts_LE = counts_LE.detach()
        all_counts_LE = counts_LE
        for ranks in self.sequence_reduces:
            all_counts_LE = ranks.all_reduce_sum(all_counts_LE.clone())
        fraction_LE = all_counts_LE / all_counts_LE.sum(-1, keepdim=True)
        balance = self.experts * (fraction_LE * probability_LE).sum(-1).mean()
        z = z_L1.mean()
        tokens = probability_LE.detach()[0].sum()  # the probabilities of each token sum to 1
        self._accumulate(counts_LE, torch.stack([balance.detach(), z.detach(), entropy_L1.detach().mean(), tokens]))
        return self.config.load_balancing_coefficient * balance + self.config.z_loss_coefficient * z

    def pop_sums(self) -> Tensor | None:
        """Return the sums since the last call, (L E + 4,) float64 on the device, or None, and reset them."""
        if self._counts_LE is None or self._totals is None:
            return None
        sums = torch.cat([self._counts_LE.flatten(), self._totals])
        self._counts_LE = self._totals = None
        return sums

    def metrics_of(self, sums: Tensor) -> dict[str, float]:
        """Return metrics by name from `pop_sums`, summed over all processes and on the CPU."""
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

    def _accumulate(self, counts_LE: Tensor, totals: Tensor) -> None:
        counts_LE, totals = counts_LE.double(), totals.double()
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE
        self._totals = totals if self._totals is None else self._totals + totals
