"""A feed-forward of experts (Shazeer et al. 2017, arXiv 1701.06538): of many, every token is sent to a few.

As PowerMoE and `transformers.GraniteMoe` have it. None is dropped: whatever an expert is sent, it computes. Each token
is copied once for each of its experts, the copies are sorted by expert, and every expert has its rows together. Both
ways are gathers, so no sum depends on the order in which threads come.

B batch, T sequence, D model width, F width of an expert, E experts, k experts of a token,
N tokens of the micro-batch, S = N k copies of them
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from models.grouped_linear import GroupedLinear, local_weight


class Experts(nn.Module):
    """SwiGLU experts and their router, whose logits are computed in float32: rounded ones are often equal."""

    def __init__(self, dim: int, ffn_dim: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.experts, self.top_k = experts, top_k
        self.router = nn.Linear(dim, experts, bias=False)
        self.w_gate_up = GroupedLinear(experts, dim, 2 * ffn_dim)  # gate first
        self.w_down = GroupedLinear(experts, ffn_dim, dim)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The output (B, T, D), and what models/router_loss.py needs of the routing: `routing_sums`.

        Of a tensor-parallel rank's part of the sequence, given as a DTensor, that part.
        """
        if isinstance(x_BTD, DTensor):
            x_BTD = x_BTD.to_local()
        x_ND = x_BTD.flatten(0, 1)
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(exact), local_weight(self.router.weight).to(exact))
        chosen_logits_Nk, chosen_Nk = logits_NE.topk(self.top_k, dim=-1)
        weight_Nk = chosen_logits_Nk.softmax(-1)

        expert_S, source_S = chosen_Nk.flatten().sort(stable=True)
        place_Nk = source_S.argsort().view_as(chosen_Nk)  # where each token's copies went
        every_E = torch.arange(self.experts, device=x_ND.device)
        ends_E = torch.searchsorted(expert_S, every_E, right=True, out_int32=True)

        x_SD = _Dispatch.apply(x_ND, source_S, place_Nk)
        gate_SF, up_SF = self.w_gate_up(x_SD, ends_E).chunk(2, -1)
        y_SD = self.w_down(F.silu(gate_SF) * up_SF, ends_E)
        y_NkD = _Collect.apply(y_SD, source_S, place_Nk)
        out_ND = torch.bmm(weight_Nk.to(y_NkD.dtype).unsqueeze(1), y_NkD).squeeze(1)
        return out_ND.view_as(x_BTD), routing_sums(logits_NE, ends_E)


def routing_sums(logits_NE: Tensor, ends_E: Tensor) -> Tensor:
    """(2 E + 2,), sums over tokens: copies sent to each expert, then the router's probability of each expert,
    its squared log-partition, and its entropy in nats.
    """
    log_partition_N = logits_NE.logsumexp(-1)
    log_p_NE = logits_NE - log_partition_N.unsqueeze(-1)
    p_NE = log_p_NE.exp()
    sent_E = ends_E.diff(prepend=ends_E.new_zeros(1)).to(p_NE.dtype)
    entropy = -(p_NE * log_p_NE).detach().sum()
    return torch.cat([sent_E, p_NE.sum(0), log_partition_N.square().sum().view(1), entropy.view(1)])


class _Dispatch(torch.autograd.Function):
    """(N, D) -> (S, D): every token once for each of its experts, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, source_S: Tensor, place_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(place_Nk)
        return x_ND[source_S // place_Nk.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_SD: Tensor) -> tuple[Tensor | None, ...]:
        (place_Nk,) = ctx.saved_tensors
        return d_SD[place_Nk].sum(1), None, None


class _Collect(torch.autograd.Function):
    """(S, D) -> (N, k, D): the way back."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, source_S: Tensor, place_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(source_S)
        return y_SD[place_Nk]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_NkD: Tensor) -> tuple[Tensor | None, ...]:
        (source_S,) = ctx.saved_tensors
        return d_NkD.flatten(0, 1)[source_S], None, None
