"""Grouped matrix multiplication: a separate linear map for each group of rows, used for the experts of an MoE.

torch's `grouped_mm` computes all groups in one kernel, without padding and without synchronizing on the group sizes. It
supports float32, bf16 and float16 on CPU and CUDA, with rows of a multiple of 16 bytes; otherwise the groups are
computed in a loop. The product is a custom operator (`torch.library`), because compiled, or on fake tensors, torch's
supports only bf16, and the loop would need the values of the group sizes.

S rows, sorted by group; G groups, I input features, O output features
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

KERNEL_DEVICES = ("cpu", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_ALIGNMENT = 16
"""Required alignment of a row, in bytes."""


class GroupedLinear(nn.Module):
    """Computes y = x @ weight[g].T for the rows x of group g, without bias."""

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))

    def forward(self, x_SI: Tensor, ends_G: Tensor) -> Tensor:
        """Return (S, O), under autocast in its dtype. Group g is the rows from ends[g - 1] to ends[g], int32."""
        weight_GOI = local_weight(self.weight)
        device = x_SI.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_SI.dtype
        y_SO: Tensor = grouped_mm(x_SI.to(dtype), weight_GOI.to(dtype), ends_G)
        return y_SO


def local_weight(weight: Tensor) -> Tensor:
    """Return a weight that TP ranks replicate as a plain tensor; each rank has a partial sum of its gradient."""
    return weight.to_local(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


@torch.library.custom_op("powertrain::grouped_mm", mutates_args=())
def grouped_mm(x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """Return (S, O): the rows of group g times weight[g].T. Differentiable once, in both arguments."""
    if kernel_supports(x_SI, weight_GOI):
        return F.grouped_mm(x_SI, weight_GOI.mT, offs=ends_G)
    return loop_over_groups(x_SI, weight_GOI, ends_G)


@torch.library.custom_op("powertrain::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(d_y_SO: Tensor, x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (S, I) and weight (G, O, I); that of a group without rows is zero."""
    d_y_SO = d_y_SO.contiguous()
    if not kernel_supports(x_SI, weight_GOI):
        return loop_over_groups(d_y_SO, weight_GOI.mT, ends_G), torch.stack(
            [d_y_sO.T @ x_sI for d_y_sO, x_sI in zip(split_rows(d_y_SO, ends_G), split_rows(x_SI, ends_G), strict=True)]
        )
    d_weight_GOI = F.grouped_mm(d_y_SO.mT, x_SI, offs=ends_G)
    if leaves_empty_groups(d_y_SO.device):
        empty_G = ends_G.diff(prepend=ends_G.new_zeros(1)) == 0
        d_weight_GOI.masked_fill_(empty_G[:, None, None], 0)
    return F.grouped_mm(d_y_SO, weight_GOI, offs=ends_G), d_weight_GOI


@cache
def leaves_empty_groups(device: torch.device) -> bool:
    """Return whether the kernel leaves the gradient of empty groups uninitialized (pytorch/pytorch#172439)."""
    return device.type != "cpu" and torch.cuda.get_device_capability(device) >= (10, 0)  # Blackwell


def kernel_supports(x_SI: Tensor, weight_GOI: Tensor) -> bool:
    """Return whether torch's kernel supports these tensors, in forward and backward."""
    aligned = all(size * x_SI.element_size() % KERNEL_ALIGNMENT == 0 for size in weight_GOI.shape[1:])
    return aligned and x_SI.device.type in KERNEL_DEVICES and x_SI.dtype in KERNEL_DTYPES


def loop_over_groups(x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """Return the same as the kernel, with one product for each group."""
    return torch.cat([x_sI @ w_OI.T for x_sI, w_OI in zip(split_rows(x_SI, ends_G), weight_GOI, strict=True)])


def split_rows(x_SI: Tensor, ends_G: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of each group. Synchronizes with the device to read `ends_G`."""
    return x_SI.split(ends_G.diff(prepend=ends_G.new_zeros(1)).tolist())


@grouped_mm.register_fake
def _(x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], weight_GOI.shape[1])


@grouped_mm_backward.register_fake
def _(d_y_SO: Tensor, x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_SI), torch.empty_like(weight_GOI)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_y_SO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *grouped_mm_backward(d_y_SO, *ctx.saved_tensors), None


grouped_mm.register_autograd(_backward, setup_context=_save)
