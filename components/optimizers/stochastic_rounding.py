"""Stochastic rounding of float32 to bf16, equal in all replicas of a shard."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def rounding_key(name: str, parameter: Tensor) -> int:
    """Return a 31-bit key of this process's shard of the parameter `name`, equal in all replicas of the shard."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    place: list[int] = []
    if mesh is not None:
        placements = parameter.placements  # type: ignore[attr-defined]
        place = [c for c, p in zip(mesh.get_coordinate(), placements, strict=True) if not p.is_replicate()]
    return int.from_bytes(hashlib.sha256(f"{name}:{place}".encode()).digest()[:4], "little") >> 1


def round_at_random(x: Tensor, step: Tensor, key: int) -> Tensor:
    """Return float32 `x` in bf16, rounded up or down with probabilities that keep the expectation.

    The random numbers depend on the position in `x`, `step`, a number () on any device, and `key` alone, and not on a
    random state, which differs between processes: replicas stay equal, and a resumed run is bitwise the same. NaN and
    infinity stay.
    """
    # bf16 is the upper half of float32: adding a random lower half carries into it with the right probability
    bits = _random_bits(x.numel(), step.to(x.device, torch.int32), key).view(x.shape)
    bits += x.view(torch.int32)
    bits &= -(2**16)
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def _random_bits(count: int, step: Tensor, key: int) -> Tensor:
    """Return `count` random numbers of 16 bits, int32: a hash of each index, which needs no synchronization."""
    # int32 wraps around. Odd factors map every number to another one; shifts mix upper bits into lower ones.
    offset = step * -0x61C88647 + key
    x = torch.arange(count, dtype=torch.int32, device=step.device).mul_(0x5851F42D).add_(offset)
    for shift, factor in ((15, 0x2C1B3C6D), (13, 0x297A2D39)):
        x ^= x >> shift
        x *= factor
    return (x >> 16).bitwise_and_(2**16 - 1)
