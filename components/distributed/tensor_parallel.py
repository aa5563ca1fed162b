"""Tensor parallelism (Megatron-LM, arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198), by DTensor.

A model provides a table from module name to style; STYLES lists the styles. Between blocks each rank holds a shard of
the sequence; inside attention and feed-forward a shard of the heads and of the hidden layer; in the head a shard of the
vocabulary, whose logits are never gathered.
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
"""Placement of (B, T, D), sharded along T."""


class TensorParallelReducer:
    """Reductions over the TP ranks, which hold the other shards of the sequence or of the vocabulary."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the TP ranks, in place, and return it."""
        dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor


class VocabShard(TensorParallelReducer):
    """The rows of the vocabulary that this rank holds, and the reductions that a softmax over all rows needs."""

    def local(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return `x` as a plain tensor, this rank's rows of `weight`, and the index of the first of them.

        Each rank computes a partial sum of the gradient of `x`.
        """
        if not isinstance(x, DTensor) or not isinstance(weight, DTensor):
            raise TypeError("the head of a tensor-parallel model expects DTensors")
        rows = weight.to_local()
        # Shard(0) gives each rank ceil(V / tp) rows, and the last ranks fewer or none.
        vocab_start = min(self.mesh.get_local_rank() * -(-weight.shape[0] // self.mesh.size()), weight.shape[0])
        return x.to_local(grad_placements=[Partial()]), rows, vocab_start

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Take the element-wise maximum over the TP ranks, in place, and return it."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return tensor


class GatherSequence(ParallelStyle):
    """Gather the first argument of the module, which is sharded along the sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = inputs
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [SEQUENCE], run_check=False)
            return (x.redistribute(placements=[Replicate()]), *rest)

        module.register_forward_pre_hook(gather)
        return module


class VocabParallelHead(GatherSequence):
    """Shard the weight of an LM head, untied or tied, by rows of the vocabulary."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _shard_first_dimension(module, device_mesh)
        module.vocab_shard = VocabShard(device_mesh)  # type: ignore[assignment]
        module.register_forward_hook(lambda part, inputs, output: _full_tensor(output))
        return super()._apply(module, device_mesh)


class ReplicatedParams(ParallelStyle):
    """Replicate the parameters of a module that processes each rank's shard of the sequence token by token."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for part in module.modules():
            for key, parameter in part.named_parameters(recurse=False):
                replicated = distribute_tensor(parameter, device_mesh, [Replicate()], src_data_rank=None)
                part.register_parameter(key, nn.Parameter(replicated))
        return module


class SequenceAllReduce(ParallelStyle):
    """Let a module without parameters sum its statistics over the tokens of all TP ranks: one of `sequence_reduces`."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.sequence_reduces.append(TensorParallelReducer(device_mesh))  # type: ignore[operator,union-attr]
        return module


class ChannelParallelNorm(ParallelStyle):
    """Shard an RMSNorm over channels of which each rank holds a part; the mean square is that of all of them."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _shard_first_dimension(module, device_mesh)
        module.channel_reduce = DifferentiableSum(device_mesh)  # type: ignore[assignment]
        return module


class DifferentiableSum:
    """The sum over the TP ranks of a tensor, each of which uses it for other channels."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum. Its gradient is the sum of the ranks' gradients."""
        summands = DTensor.from_local(tensor, self.mesh, [Partial()], run_check=False)
        return summands.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _shard_first_dimension(module: nn.Module, mesh: DeviceMesh) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        part = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(part))


def _full_tensor(output: Tensor) -> Tensor:
    """Return full logits; a loss is already equal on all ranks."""
    return output.full_tensor() if isinstance(output, DTensor) else output


class VocabParallelEmbedding(RowwiseParallel):
    """Shard an embedding by rows; its output is sharded along the sequence."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate(), output_layouts=SEQUENCE)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        sharded = super()._apply(module, device_mesh)
        # The output is an AsyncCollectiveTensor while its communication is in progress, and a compiled block that
        # receives one computes wrong gradients (torch 2.13).
        sharded.register_forward_hook(lambda part, inputs, output: wait_tensor(output))
        return sharded


STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "embedding": VocabParallelEmbedding,
    "sequence": SequenceParallel,
    "sequence_to_local": lambda: SequenceParallel(use_local_output=True),
    "heads": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
    "channels": ChannelParallelNorm,
    "gather_sequence": GatherSequence,
    "columns": ColwiseParallel,
    "rows": lambda: RowwiseParallel(output_layouts=SEQUENCE),
    "vocabulary": VocabParallelHead,
    "replicated": ReplicatedParams,
    "sequence_all_reduce": SequenceAllReduce,
}
"""Style name -> constructor: the values that a table of a model may use."""


def apply_tensor_parallel(model: nn.Module, table: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Parallelize the modules of `model` (on the meta device) that `table` names; `*` matches one part of a name.

    Raises ValueError for a style not in STYLES, and for a parameter that no module of the table holds: each rank would
    train it independently.
    """
    for name, style in table.items():
        if style not in STYLES:
            raise ValueError(f"{name}: unknown style {style!r}; use one of {', '.join(map(repr, STYLES))}")
    parallelize_module(model, mesh, {name: STYLES[style]() for name, style in table.items()})
    missing = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if missing:
        more = " ..." if len(missing) > 3 else ""
        raise InputError("tp", f"the model's table lacks {', '.join(missing[:3])}{more}; add their modules to plan(tp)")
