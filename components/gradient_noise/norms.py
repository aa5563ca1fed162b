"""Squared norms of gradients that are sharded over many processes, exact enough to subtract one from another."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 4096
"""Elements added up in float32 at a time. On CPUs torch adds all elements of a tensor in a few float32 registers: the
relative error of the norm of two million elements is 2e-4 (torch 2.13). In chunks of this size it is 2e-7, at the same
speed."""
MAX_PENDING_TENSORS = 8
"""Tensors on a GPU whose norms are computed in one launch. They stay in memory until then: about one block's."""


def chunk_norms(tensor: Tensor) -> Tensor:
    """Return the norms (chunks,) of the chunks of `tensor`, in float32, or float64 for a float64 tensor."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    # The order of elements does not matter, so a transposed tensor is read in memory order, without a copy.
    dense = tensor if tensor.is_contiguous() else tensor.mT if tensor.ndim > 1 and tensor.mT.is_contiguous() else None
    flat = (tensor.contiguous() if dense is None else dense).view(-1)
    full = flat.numel() // CHUNK * CHUNK  # elements in full chunks
    parts = []
    if full:
        parts.append(torch.linalg.vector_norm(flat[:full].view(-1, CHUNK), dim=1, dtype=dtype))  # (full / CHUNK,)
    if full < flat.numel() or not full:
        parts.append(torch.linalg.vector_norm(flat[full:], dtype=dtype).reshape(1))  # (1,), the remainder
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class SquaredNorm:
    """Adds up the squared norms of this process's shards. The sum over all processes is that of the full tensors.

    The square of a shard that n processes hold as replicas is divided by n on each of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._norms: dict[int, list[Tensor]] = {}  # by number of replicas
        self._pending: dict[tuple[int, torch.dtype], list[Tensor]] = {}  # by number of replicas and dtype

    def add(self, tensor: Tensor) -> None:
        """Add a plain tensor, or a DTensor without Partial placements."""
        copies, local = local_part(tensor)
        self.add_local(local, copies)

    def add_local(self, local: Tensor, copies: int) -> None:
        """Add a plain tensor that `copies` processes hold."""
        if not local.is_cuda:
            self._norms.setdefault(copies, []).append(chunk_norms(local))
            return
        # detach() makes an alias: autograd copies a gradient to which there is a second reference
        pending = self._pending.setdefault((copies, local.dtype), [])
        pending.append(local.detach())
        if len(pending) >= MAX_PENDING_TENSORS:
            self._launch(copies, pending)

    def _launch(self, copies: int, pending: list[Tensor]) -> None:
        """Compute the norms of the pending tensors in one launch. GPUs add in a tree, so float32 is exact enough."""
        if pending:
            dtype = torch.promote_types(pending[0].dtype, torch.float32)
            norms = torch._foreach_norm(pending, 2, dtype)
            self._norms.setdefault(copies, []).append(torch.stack(norms))
            pending.clear()

    def flush(self) -> None:
        """Reduce all norms so far to one number. Until then the chunk norms of every tensor stay in memory."""
        for (copies, _), pending in self._pending.items():
            self._launch(copies, pending)
        for copies, norms in self._norms.items():
            # float64, because the estimates subtract sums of nearly equal size
            self._total += torch.cat(norms).double().square().sum() / copies
        self._norms.clear()

    def total(self) -> Tensor:
        """Return this process's sum of squares, () float64 on the device. Does not synchronize."""
        self.flush()
        return self._total


def local_part(tensor: Tensor) -> tuple[int, Tensor]:
    """Return the number of replicas of this process's shard of `tensor`, and the shard."""
    if not dist.is_available() or not dist.is_initialized():
        return 1, tensor
    from torch.distributed.tensor import DTensor  # imported here: a single process never needs it

    if not isinstance(tensor, DTensor):
        return 1, tensor
    sizes = tensor.device_mesh.shape
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("the norm of a DTensor with Partial placements is undefined; redistribute it first")
    copies = math.prod(size for size, place in zip(sizes, tensor.placements, strict=True) if place.is_replicate())
    return copies, tensor.to_local()
