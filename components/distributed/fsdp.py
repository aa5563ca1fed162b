"""FSDP2: parameters, gradients and optimizer state in shards, gathered a unit at a time.

torch.distributed.fsdp takes most of a second to import, so it is imported where it is used: a typo is told before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

GradSyncMode = Literal["every_micro_batch", "once_per_step", "auto"]


def apply_fsdp(model: nn.Module, units: Sequence[Sequence[str]], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard `model` in place. Each of `units` is a group of modules that are gathered together, in the order of use.

    A unit is gathered for its forward, released, and gathered again for its backward; the last one is kept from the one
    to the other, for its backward follows at once. A unit of embeddings is not gathered again: the gradient of a lookup
    does not need the table. What no unit holds is gathered once, for the whole pass. Parameters are cast to
    `compute_dtype` before they are gathered; gradients are reduced in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    def cut(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(parameter.shape, mesh.size(-1)))

    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    sharded: list[FSDPModule] = []
    for number, names in enumerate(units):
        modules = [model.get_submodule(name) for name in names]
        last = number == len(units) - 1
        fully_shard(modules, mesh=mesh, mp_policy=precision, reshard_after_forward=not last, shard_placement_fn=cut)
        unit: FSDPModule = modules[0]  # type: ignore[assignment]  # fully_shard made it one, in place
        unit.set_unshard_in_backward(not all(isinstance(module, nn.Embedding) for module in modules))
        sharded.append(unit)
    root: FSDPModule = fully_shard(
        model, mesh=mesh, mp_policy=precision, reshard_after_forward=False, shard_placement_fn=cut
    )
    _prefetch_explicitly(root, sharded)


def _prefetch_explicitly(root: FSDPModule, units: Sequence[FSDPModule]) -> None:
    """Let every unit gather the next one in the order of use, forward and backward.

    FSDP2 would find the order of backward in the order of past forwards, which it only forgets after the last backward
    of a step: from the second micro-batch on the first unit would gather the last unit of the micro-batch before.
    """
    for position, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[position + 1 : position + 2]))
        # An empty list would mean the default, so the first unit names itself: it is gathered, and nothing happens.
        unit.set_modules_to_backward_prefetch([units[max(0, position - 1)]])
    root.set_modules_to_backward_prefetch([units[-1] if units else root])


def shard_dim(shape: Sequence[int], ranks: int) -> int:
    """Along which dimension a parameter is cut among `ranks`: the first, in parts that may differ by one row.

    Of the matrices of some experts the second, if that gives all ranks equally much, and the first does not.
    """
    return 1 if len(shape) == 3 and shape[0] % ranks and shape[1] % ranks == 0 else 0


class GradSync:
    """When gradients cross processes and for how long weights stay gathered: for a micro-batch, or for a step.

    `reduce` keeps only this rank's shard of weights and gradient: the weights are gathered for every forward and
    backward, and the gradient is reduced after each; replicas still exchange theirs once a step. `local` keeps weights
    and float32 gradient whole for a step, so both cross the network once. Both give the same sums.
    """

    def __init__(self, model: nn.Module, *, local: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.model = model if isinstance(model, FSDPModule) else None
        self.local = local
        if self.model is not None and local:
            # Validation, too, then gathers once and not for every chunk, and the next step finds the weights in place.
            self.model.set_reshard_after_forward(False)

    def before_backward(self, *, last: bool) -> None:
        """Call before the backward of each micro-batch; `last` ends the step."""
        if self.model is None:
            return
        self.model.set_is_last_backward(last)
        if self.local:
            self.model.set_requires_gradient_sync(last)
            # The update changes the shards: what was gathered of the weights before it must go.
            self.model.set_reshard_after_backward(last)
        else:
            self.model.set_requires_all_reduce(last)
