"""Weights from (seed, parameter name) alone: the same on every device, in every dtype and under every sharding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from models.random_normal import fill_runs


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter; equal in every process and version of Python, unlike `hash`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def fill_normal(parameter: Tensor, *, name: str, seed: int, std: float) -> None:
    """Fills `parameter` in place with N(0, std^2), drawn in float32 on the CPU; of a sharded one only this rank's part.

    Element i of the full tensor, counted row by row, is number i of the stream of (seed, name).
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    starts, length = runs(tuple(parameter.shape), local_indices(parameter))
    drawn = np.empty(local.numel(), dtype=np.float32)
    fill_runs(drawn, starts, length, key=seed_of(seed, name), std=std, threads=torch.get_num_threads())
    local.copy_(torch.from_numpy(drawn).view(local.shape))


def local_indices(parameter: Tensor) -> list[np.ndarray | None]:
    """Of each dimension the indices that this rank holds, or None for all of them; a part of a tensor is their product.

    Placements are applied to each dimension alone, so that any nesting of shards comes out as DTensor makes it.
    """
    indices: list[np.ndarray | None] = [None] * parameter.dim()
    if isinstance(parameter, DTensor):
        for dimension, size in enumerate(parameter.shape):
            own = [_along_first(p) if _cuts(p, dimension) else Replicate() for p in parameter.placements]
            if not all(isinstance(placement, Replicate) for placement in own):
                whole = torch.arange(size)
                part = distribute_tensor(whole, parameter.device_mesh, own, src_data_rank=None).to_local()
                indices[dimension] = part.cpu().numpy()
    return indices


def _cuts(placement: Placement, dimension: int) -> bool:
    return getattr(placement, "dim", None) == dimension


def _along_first(placement: Any) -> Placement:
    """The same cut of a tensor's first dimension. FSDP notes in its own kind of shard how often it cuts those of TP."""
    factor = getattr(placement, "split_factor", None)
    cut: Placement = Shard(0) if factor is None else type(placement)(0, split_factor=factor)
    return cut


def runs(shape: tuple[int, ...], indices: Sequence[np.ndarray | None]) -> tuple[np.ndarray, int]:
    """Where the elements at `indices` lie in a tensor of `shape`, row by row: the starts of runs, and their length."""
    starts, length = np.zeros(1, dtype=np.int64), 1
    for dimension in reversed(range(len(shape))):
        own, stride = indices[dimension], math.prod(shape[dimension + 1 :])
        if own is None:
            own = np.arange(shape[dimension])
        # What follows is whole, and these are neighbours: they make one run.
        if length == stride and len(starts) == 1 and len(own) and own[-1] - own[0] == len(own) - 1:
            starts, length = (
                starts + own[0] * stride,
                length * len(own),
            )  # what follows is whole, and these are neighbours
        else:
            starts = (own[:, None] * stride + starts[None, :]).reshape(-1)
    return starts, length


@torch.no_grad()
def copy_full(parameter: Tensor, full: Tensor) -> None:
    """Copies a full CPU tensor into a parameter of any sharding, device and dtype; no communication."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank cuts its own share out of its own, equal, full tensor
        share = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(share.to_local())
    else:
        parameter.copy_(full)
