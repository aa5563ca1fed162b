"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), with gains around one or around zero."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.presets import LlamaShape
from models.recompute import recompute


class ChannelReduce(Protocol):
    """A sum over the processes that hold the other channels, with a gradient."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension. The gain is the weight, or 1 + weight if `zero_centered`."""

    def __init__(self, dim: int, eps: float, *, zero_centered: bool = False) -> None:
        super().__init__()
        self.dim, self.eps, self.zero_centered = dim, eps, zero_centered
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centered else torch.ones(dim))
        self.channel_reduce: ChannelReduce | None = None
        """Set if this process holds a part of the channels: tensor parallelism over the heads that share a norm."""

    @classmethod
    def of(cls, shape: LlamaShape, dim: int | None = None) -> RMSNorm:
        """Return a norm of `dim` channels, by default the width of the model."""
        return cls(dim or shape.dim, shape.norm_eps, zero_centered=shape.zero_centered_norm)

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_reduce is None and not self.zero_centered:
            return rms_norm(x, self.weight, self.eps)
        # float32: in bf16, 1 + weight would lose the low bits of the weight
        exact = torch.promote_types(x.dtype, torch.float32)
        gain = (self.weight if self.channel_reduce is None else local_part(self.weight)).to(exact)
        if self.zero_centered:
            gain = 1 + gain
        if self.channel_reduce is None:
            return rms_norm(x.to(exact), gain, self.eps).to(x.dtype)
        z = x.to(exact)
        mean_square = self.channel_reduce.all_reduce_sum(z.square().sum(-1, keepdim=True)) / self.dim
        return (z * torch.rsqrt(mean_square + self.eps) * gain).to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * gain over the last dimension."""

    def normalize(x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, gain.shape, gain, eps)

    # without a fused kernel, as on a CPU, the backward pass would keep the normalized x too
    return recompute(normalize, x, gain) if x.device.type == "cpu" else normalize(x, gain)


def local_part(weight: Tensor) -> Tensor:
    """Return this rank's channels of a weight as a plain tensor."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
