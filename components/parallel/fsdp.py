"""FSDP2: parameters, gradients and optimizer state in shards, gathered a unit at a time.

torch.distributed.fsdp takes most of a second to import, so it is imported where it is used: a typo is told before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

Accumulation = Literal["reduce", "local", "auto"]

LOCAL_SHARE = 0.1
"""`auto` accumulates locally while the whole gradient takes at most this share of the device's memory."""


def shard(model: nn.Module, units: Sequence[Sequence[str]], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard `model` in place. Each of `units` is a group of modules that are gathered together, in the order of use.

    A unit is gathered for its forward, released, and gathered again for its backward; the last one is kept from the one
    to the other, for its backward follows at once. What no unit holds is gathered once, for the whole pass. Parameters
    are cast to `compute_dtype` before they are gathered; gradients are reduced in float32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    def cut(parameter: nn.Parameter) -> Shard:
        return Shard(cut_dimension(parameter.shape, mesh.size(-1)))

    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    sharded: list[FSDPModule] = []
    for number, names in enumerate(units):
        modules = [model.get_submodule(name) for name in names]
        last = number == len(units) - 1
        fully_shard(modules, mesh=mesh, mp_policy=precision, reshard_after_forward=not last, shard_placement_fn=cut)
        sharded.append(modules[0])  # type: ignore[arg-type]  # fully_shard made it one, in place
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False, shard_placement_fn=cut)
    for unit, following in pairwise(sharded):
        unit.set_modules_to_forward_prefetch([following])


def cut_dimension(shape: Sequence[int], ranks: int) -> int:
    """Along which dimension a parameter is cut among `ranks`: the first, in parts that may differ by one row.

    Of the matrices of some experts the second, if that gives all ranks equally much, and the first does not.
    """
    return 1 if len(shape) == 3 and shape[0] % ranks and shape[1] % ranks == 0 else 0


class GradientReduction:
    """When gradients cross processes: after every micro-batch, or once a step.

    `reduce` keeps only this rank's shard of the gradient; replicas still exchange theirs once a step. `local` keeps the
    whole float32 gradient and communicates once. Both give the same sums.
    """

    def __init__(self, model: nn.Module, mode: Accumulation, *, tp: int, device_memory: int) -> None:
        """`tp` is the number of slices that the matrices are in; `device_memory`, in bytes, is for `auto`."""
        from torch.distributed.fsdp import FSDPModule

        self.model = model if isinstance(model, FSDPModule) else None
        # experts are whole on every slice
        whole = 4 * sum(weight.numel() / (1 if weight.ndim == 3 else tp) for weight in model.parameters())
        self.local = mode == "local" or (mode == "auto" and whole <= LOCAL_SHARE * device_memory)

    def before_backward(self, *, last: bool) -> None:
        """Call before the backward of each micro-batch; `last` ends the step."""
        if self.model is None:
            return
        self.model.set_is_last_backward(last)
        if self.local:
            self.model.set_requires_gradient_sync(last)
        else:
            self.model.set_requires_all_reduce(last)
