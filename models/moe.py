"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): a feed-forward that sends every token to top_k experts.

The same function as PowerMoE and `transformers.GraniteMoe`. No token is dropped. Each token is copied once for each of
its experts, and the copies are sorted by expert, so that the rows of an expert are contiguous. Permuting and
unpermuting are gathers, so no sum depends on the order of threads.

B batch, T sequence, D model width, F width of an expert, E experts, k experts of a token,
N tokens of the micro-batch, S = N k copies of them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from models.grouped_linear import GroupedLinear, local_weight
from models.presets import Activation
from models.recompute import recompute


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


GATED: Mapping[Activation, Callable[[Tensor, Tensor], Tensor]] = {"silu": swiglu, "gelu_tanh": geglu}
"""Gates of a feed-forward (Shazeer 2020, arXiv 2002.05202), by activation; that of GeGLU is GELU's tanh approximation,
as in Gemma."""


class MoE(nn.Module):
    """Gated experts and their router. Router logits are float32, because rounded logits are often equal."""

    def __init__(self, dim: int, ffn_dim: int, experts: int, top_k: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.experts, self.top_k, self.activation = experts, top_k, activation
        self.router = nn.Linear(dim, experts, bias=False)
        self.w_gate_up = GroupedLinear(experts, dim, 2 * ffn_dim)  # gate first
        self.w_down = GroupedLinear(experts, ffn_dim, dim)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output (B, T, D), and the `routing_sums` that models/router_loss.py needs.

        Under tensor parallelism `x_BTD` is a DTensor, and both are those of this rank's shard of the sequence.
        """
        if isinstance(x_BTD, DTensor):
            x_BTD = x_BTD.to_local()
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = router_logits(x_ND, local_weight(self.router.weight))
        chosen_logits_Nk, chosen_Nk = logits_NE.topk(self.top_k, dim=-1)
        weight_Nk = chosen_logits_Nk.softmax(-1)

        # Sort the S = N k copies by expert. Narrow keys, because a radix sort on a GPU takes a pass per byte.
        keys_S = chosen_Nk.flatten().to(torch.uint8 if self.experts <= 256 else torch.int16)
        # source_S[s] is the copy (token * k + choice) in row s; slot_Nk is the inverse, the row of each copy
        expert_S, source_S = keys_S.sort(stable=True)
        slots_S = torch.arange(len(source_S), device=x_ND.device)
        slot_Nk = torch.empty_like(source_S).scatter_(0, source_S, slots_S).view_as(chosen_Nk)
        # ends_E[e] is the row after the last of expert e
        every_E = torch.arange(self.experts, device=x_ND.device, dtype=keys_S.dtype)
        ends_E = torch.searchsorted(expert_S, every_E, right=True, out_int32=True)

        x_SD = _Permute.apply(x_ND, source_S, slot_Nk)
        weight_S = _PermuteRows.apply(weight_Nk, source_S, slot_Nk)
        gate_SF, up_SF = self.w_gate_up(x_SD, ends_E).chunk(2, -1)
        # apply the router weights before w_down, which is linear: rows of width F are narrower than those of width D
        hidden_SF = recompute(GATED[self.activation], gate_SF, up_SF) * weight_S.to(gate_SF.dtype).unsqueeze(-1)
        y_SD = self.w_down(hidden_SF, ends_E)
        out_ND = _Unpermute.apply(y_SD, source_S, slot_Nk)
        return out_ND.view_as(x_BTD), routing_sums(logits_NE, ends_E)


def router_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """Return router logits (N, E), at least float32.

    Products of bf16 numbers are exact in float32, so on a GPU tensor cores compute them. The gradients are bf16
    products, as for every other matrix.
    """
    if x_ND.is_cuda and x_ND.dtype == weight_ED.dtype == torch.bfloat16:
        logits_NE: Tensor = _mm_float32(x_ND, weight_ED)
        return logits_NE
    exact = torch.promote_types(x_ND.dtype, torch.float32)
    with torch.autocast(x_ND.device.type, enabled=False):
        return F.linear(x_ND.to(exact), weight_ED.to(exact))


@torch.library.custom_op("powertrain::mm_float32", mutates_args=())
def _mm_float32(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    return torch.mm(x_ND, weight_ED.T, out_dtype=torch.float32)


@_mm_float32.register_fake
def _(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], weight_ED.shape[0], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_NE: Tensor) -> tuple[Tensor, Tensor]:
    x_ND, weight_ED = ctx.saved_tensors
    d_NE = d_NE.to(x_ND.dtype)
    return d_NE @ weight_ED, d_NE.T @ x_ND


_mm_float32.register_autograd(_backward, setup_context=_save)


def routing_sums(logits_NE: Tensor, ends_E: Tensor) -> Tensor:
    """Return (2 E + 2,) sums over tokens: the number of copies sent to each expert, the router's probability of each
    expert, its squared log-partition, and its entropy in nats.
    """
    log_partition_N = logits_NE.logsumexp(-1)
    log_p_NE = logits_NE - log_partition_N.unsqueeze(-1)
    p_NE = log_p_NE.exp()
    tokens_per_expert_E = ends_E.diff(prepend=ends_E.new_zeros(1)).to(p_NE.dtype)
    entropy = -(p_NE * log_p_NE).detach().sum()
    return torch.cat([tokens_per_expert_E, p_NE.sum(0), log_partition_N.square().sum().view(1), entropy.view(1)])


def gather_sum(y_SD: Tensor, slot_Nk: Tensor) -> Tensor:
    """Return (N, D): the sum of each token's k copies."""
    if not torch.compiler.is_compiling():
        return y_SD[slot_Nk].sum(1)
    # k gathers in one element-wise kernel; the compiler's reduction over so few terms is slow
    exact = torch.promote_types(y_SD.dtype, torch.float32)
    first, *others = slot_Nk.unbind(1)
    total_ND = y_SD[first].to(exact)
    for slot_N in others:
        total_ND = total_ND + y_SD[slot_N].to(exact)
    return total_ND.to(y_SD.dtype)


class _Permute(torch.autograd.Function):
    """(N, D) -> (S, D): every token once for each of its experts, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, source_S: Tensor, slot_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(slot_Nk)
        return x_ND[source_S // slot_Nk.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_SD: Tensor) -> tuple[Tensor | None, ...]:
        (slot_Nk,) = ctx.saved_tensors
        return gather_sum(d_SD, slot_Nk), None, None


class _PermuteRows(torch.autograd.Function):
    """(N, k) -> (S,): one value for each copy, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, weight_Nk: Tensor, source_S: Tensor, slot_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(slot_Nk)
        return weight_Nk.flatten()[source_S]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_S: Tensor) -> tuple[Tensor | None, ...]:
        (slot_Nk,) = ctx.saved_tensors
        return d_S[slot_Nk], None, None


class _Unpermute(torch.autograd.Function):
    """(S, D) -> (N, D): the sum of each token's copies."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, source_S: Tensor, slot_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(source_S)
        ctx.top_k = slot_Nk.shape[1]
        return gather_sum(y_SD, slot_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_ND: Tensor) -> tuple[Tensor | None, ...]:
        (source_S,) = ctx.saved_tensors
        return d_ND[source_S // ctx.top_k], None, None
