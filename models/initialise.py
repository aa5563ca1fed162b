"""Weights from (seed, parameter name) alone: the same on every device, in every dtype and under every sharding."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter; equal in every process and version of Python, unlike `hash`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def fill_normal(parameter: nn.Parameter, *, name: str, seed: int, std: float) -> None:
    """Fills `parameter` in place with N(0, std^2): drawn in full, on the CPU, in float32; this rank keeps its share."""
    generator = torch.Generator("cpu").manual_seed(seed_of(seed, name))
    full = torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator)
    copy_full(parameter, full)


@torch.no_grad()
def copy_full(parameter: Tensor, full: Tensor) -> None:
    """Copies a full CPU tensor into a parameter of any sharding, device and dtype; no communication."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank cuts its own share out of its own, equal, full tensor
        share = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(share.to_local())
    else:
        parameter.copy_(full)
