"""Context parallelism: the sequences of a data-parallel rank are cut among several ranks (Llama 3, arXiv 2407.21783).

Rank r of n holds chunks r and 2n - 1 - r of the 2n equal chunks of every sequence, so that causal attention is equally
much work on all of them. Keys and values are gathered for attention; everything else works token by token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

BUCKET = 2**24
"""Elements that are reduced at a time: 64 MiB."""


class ContextParallelRanks:
    """This process among the ranks that hold the other chunks of its sequences. Lengths are divisible by 2n."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """`mesh` is (n,)."""
        self.mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()

    def chunks(self, length: int) -> tuple[int, int, int]:
        """Return the starts of this rank's two chunks of a sequence of `length` tokens, and their length.

        Raises ValueError for a length that cannot be cut.
        """
        chunk, rest = divmod(length, 2 * self.size)
        if rest:
            raise ValueError(f"{length} tokens cannot be cut into 2 x {self.size} (parallel.cp) equal chunks")
        return self.rank * chunk, (2 * self.size - 1 - self.rank) * chunk, chunk

    def shard(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's chunks of a tensor that has whole sequences along `dim`."""
        first, second, chunk = self.chunks(tensor.shape[dim])
        return torch.cat((tensor.narrow(dim, first, chunk), tensor.narrow(dim, second, chunk)), dim)

    def gather(self, local: Tensor) -> Tensor:
        """Return the whole sequences of which each rank has its chunks, (B, T / n, ...) -> (B, T, ...).

        The gradient of this rank's chunks is the sum over the ranks.
        """
        parts = DTensor.from_local(local, self.mesh, [Shard(1)], run_check=False)
        by_rank = parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        # (n, 2): the chunks that each rank has; -> (2n,): chunk r is the first of rank r, 2n - 1 - r its second
        heads, tails = by_rank.unflatten(1, (self.size, 2, -1)).unbind(2)
        return torch.cat((heads, tails.flip(1)), 1).flatten(1, 2)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over these ranks, in place, and return it."""
        dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of these ranks, (n, ...), without a gradient."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor.detach().contiguous(), group=self.mesh.get_group())
        return gathered


class SummandGradients:
    """Adds up the gradients of a micro-batch, of which each context-parallel rank has computed a summand.

    Gradients are reduced in full buffers: collectives of single parameters would take longer to start than to run.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        """`mesh` is (cp,) or (cp, tp)."""
        self.mesh = mesh
        self._group, self._size = mesh.get_group(0), mesh.size(0)
        self._buffers: dict[int, tuple[Tensor, int]] = {}
        """Number of TP ranks that hold the same values -> buffer, and the elements that are filled."""

    def add(self, local: Tensor, copies: int) -> Iterator[tuple[Tensor, int]]:
        """Copy this rank's part of a gradient, which `copies` TP ranks hold, and yield parts of the sum that are
        complete: this rank's shard (n,) in float32, and the number of ranks that hold the same."""
        values = local.detach().reshape(-1)
        while values.numel():
            buffer, filled = self._buffers.get(copies) or (self._new_buffer(local), 0)
            count = min(len(buffer) - filled, len(values))
            buffer[filled : filled + count].copy_(values[:count])
            self._buffers[copies] = buffer, filled + count
            values = values[count:]
            if filled + count == len(buffer):
                yield self._reduce(copies), copies

    def flush(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the rest of the sums: call after the last gradient of a micro-batch."""
        for copies, (_, filled) in self._buffers.items():
            if filled:
                yield self._reduce(copies), copies

    def whole(self, gradient: Tensor) -> DTensor:
        """Return the sum of one gradient in float32, sharded over the ranks."""
        local, others = gradient, []
        if isinstance(gradient, DTensor):
            local, others = gradient.to_local(), list(gradient.placements)
        placements = [Partial(), *others]
        summands = DTensor.from_local(local.float(), self.mesh, placements, run_check=False)
        # a dimension that tp has not cut; none: every rank has the whole sum
        taken = [place.dim for place in others if isinstance(place, Shard)]
        free = next((dim for dim in range(local.ndim) if dim not in taken), None)
        return summands.redistribute(placements=[Replicate() if free is None else Shard(free), *others])

    def _new_buffer(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.empty(BUCKET // self._size * self._size, dtype=dtype, device=like.device)

    def _reduce(self, copies: int) -> Tensor:
        """Return this rank's shard of the sum of a buffer, and empty it."""
        buffer, filled = self._buffers[copies]
        padded = -(-filled // self._size) * self._size
        buffer[filled:padded].zero_()
        shard = buffer.new_empty(padded // self._size)
        dist.reduce_scatter_tensor(shard, buffer[:padded], group=self._group)
        self._buffers[copies] = buffer, 0
        return shard
