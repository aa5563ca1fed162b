"""Squared norms of gradients that lie in parts on many processes, exact enough to subtract one from another."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 4096
"""Elements that are added up in float32 at a time. On CPUs torch adds all of a tensor in a few float32 registers, which
loses 2e-4 of the norm of two million elements (torch 2.13); in pieces of this size 2e-7, in the same time."""
MAX_PENDING_TENSORS = 8
"""Tensors on a GPU whose norms one launch computes. They stay in memory until then: about the gradients of a block."""


def chunk_norms(tensor: Tensor) -> Tensor:
    """Norms (pieces,), float32 or float64 as of `tensor`, of pieces of it: their squares add up to its square."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    # the order of elements does not matter: a transposed tensor is read as it lies in memory
    dense = tensor if tensor.is_contiguous() else tensor.mT if tensor.ndim > 1 and tensor.mT.is_contiguous() else None
    flat = (tensor.contiguous() if dense is None else dense).view(-1)
    whole = flat.numel() // CHUNK * CHUNK
    parts = []
    if whole:
        parts.append(torch.linalg.vector_norm(flat[:whole].view(-1, CHUNK), dim=1, dtype=dtype))
    if whole < flat.numel() or not whole:
        parts.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype).reshape(1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class SquaredNorm:
    """Adds up squares, on each process those of its part. Summed over all processes of a run they are the whole's.

    A part that several processes hold alike counts on each for its share.
    """

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._norms: dict[int, list[Tensor]] = {}
        self._waiting: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def add(self, tensor: Tensor) -> None:
        """A plain tensor, or a DTensor without partial sums."""
        copies, local = local_part(tensor)
        if not local.is_cuda:
            self._norms.setdefault(copies, []).append(chunk_norms(local))
            return
        # An alias: a second reference to the gradient itself would make autograd copy it when it keeps it.
        waiting = self._waiting.setdefault((copies, local.dtype), [])
        waiting.append(local.detach())
        if len(waiting) >= MAX_PENDING_TENSORS:
            self._launch(copies, waiting)

    def _launch(self, copies: int, waiting: list[Tensor]) -> None:
        """Norms of the tensors on a GPU that wait for it, which adds them up in a tree, in float32 or better."""
        if waiting:
            dtype = torch.promote_types(waiting[0].dtype, torch.float32)
            norms = torch._foreach_norm(waiting, 2, dtype)
            self._norms.setdefault(copies, []).append(torch.stack(norms))
            waiting.clear()

    def fold(self) -> None:
        """Bring what was added into one number: until then, every tensor keeps its norms."""
        for (copies, _), waiting in self._waiting.items():
            self._launch(copies, waiting)
        for copies, norms in self._norms.items():
            self._total += torch.cat(norms).double().square().sum() / copies
        self._norms.clear()

    def total(self) -> Tensor:
        """(), float64, on the device: the squares on this process. Waits for nothing."""
        self.fold()
        return self._total


def local_part(tensor: Tensor) -> tuple[int, Tensor]:
    """The number of processes that hold the same part of `tensor`, and that part."""
    if not dist.is_available() or not dist.is_initialized():
        return 1, tensor
    from torch.distributed.tensor import DTensor  # a process alone has no use for it

    if not isinstance(tensor, DTensor):
        return 1, tensor
    sizes = tensor.device_mesh.shape
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a tensor of partial sums has no norm yet: reduce it first")
    copies = math.prod(size for size, place in zip(sizes, tensor.placements, strict=True) if place.is_replicate())
    return copies, tensor.to_local()
