"""Tensor parallelism (Megatron-LM, arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198), by DTensor.

A model says in a table, by module name, how its modules are divided; STYLES is what the words of that table mean.
Between blocks each rank holds its part of the sequence; inside attention and feed-forward its part of the heads and of
the hidden layer; in the head its part of the vocabulary, of which no logits are ever gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from components.errors import InputError

SEQUENCE = Shard(1)
"""(B, T, D) divided along T."""


class VocabShard:
    """The rows of the vocabulary that this rank holds, and the reductions that make a softmax of all of them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def local(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int]:
        """This rank's `x`, its rows of `weight`, the number of the first. The gradient of `x` is a sum over ranks."""
        if not isinstance(x, DTensor) or not isinstance(weight, DTensor):
            raise TypeError("the head of a tensor-parallel model takes DTensors")
        rows = weight.to_local()
        first = min(self.mesh.get_local_rank() * -(-weight.shape[0] // self.mesh.size()), weight.shape[0])
        return x.to_local(grad_placements=[Partial()]), rows, first

    def maximum(self, tensor: Tensor) -> Tensor:
        """Element-wise, over the ranks, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor


class GatherSequence(ParallelStyle):
    """A module whose first argument comes divided along the sequence, and which works on all of it."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = inputs
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [SEQUENCE], run_check=False)
            return (x.redistribute(placements=[Replicate()]), *rest)

        module.register_forward_pre_hook(gather)
        return module


class VocabParallelHead(GatherSequence):
    """A head whose weight, its own or a tied one, is divided by rows."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for key, parameter in module.named_parameters(recurse=False):
            rows = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(rows))
        module.vocabulary = VocabShard(device_mesh)  # type: ignore[assignment]
        module.register_forward_hook(lambda part, inputs, output: _full_tensor(output))
        return super()._apply(module, device_mesh)


class ReplicatedParams(ParallelStyle):
    """A module that works token by token: on this rank's part of the sequence, with parameters that all ranks hold."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for part in module.modules():
            for key, parameter in part.named_parameters(recurse=False):
                whole = distribute_tensor(parameter, device_mesh, [Replicate()], src_data_rank=None)
                part.register_parameter(key, nn.Parameter(whole))
        return module


class SequenceReducer:
    """Sums over the ranks that hold the other parts of the sequence."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor


class SequenceAllReduce(ParallelStyle):
    """A module without parameters that knows of its rank's tokens, and has to know of all."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.across = SequenceReducer(device_mesh)  # type: ignore[assignment]
        return module


def _full_tensor(output: Tensor) -> Tensor:
    """Logits, where they were asked for; the loss is whole already."""
    return output.full_tensor() if isinstance(output, DTensor) else output


class VocabParallelEmbedding(RowwiseParallel):
    """An embedding whose rows are divided; its output is divided along the sequence."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate(), output_layouts=SEQUENCE)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split_up = super()._apply(module, device_mesh)
        # A tensor whose exchange is still under way is of a class of its own, and a compiled block that is given one
        # computes wrong gradients (torch 2.13).
        split_up.register_forward_hook(lambda part, inputs, output: wait_tensor(output))
        return split_up


STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "embedding": VocabParallelEmbedding,
    "sequence": SequenceParallel,
    "gather sequence": GatherSequence,
    "columns": ColwiseParallel,
    "rows": lambda: RowwiseParallel(output_layouts=SEQUENCE),
    "vocabulary": VocabParallelHead,
    "own tokens": ReplicatedParams,
    "all tokens": SequenceAllReduce,
}
"""What a table may say of a module."""


def apply_tensor_parallel(model: nn.Module, table: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Divide the modules of `model` (on the meta device) that `table` names; `*` in a name stands for one part of it.

    Raises ValueError for a word that is none of STYLES and for a parameter that no module of the table holds: it would
    be trained on each rank by itself.
    """
    for name, style in table.items():
        if style not in STYLES:
            raise ValueError(f"{name}: {style!r} is no style; there are {', '.join(map(repr, STYLES))}")
    parallelize_module(model, mesh, {name: STYLES[style]() for name, style in table.items()})
    left = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if left:
        raise InputError("tp", f"the table leaves out {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}")
