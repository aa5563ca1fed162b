"""FSDP2: sharded parameters, gradients and optimizer state, gathered one group of modules at a time.

The groups come from the model's plan (models/parallel_plan.py).

torch.distributed.fsdp takes most of a second to import; functions import it, so that mistakes are reported before.
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


def apply_fsdp(
    model: nn.Module, fsdp_groups: Sequence[Sequence[str]], mesh: DeviceMesh, compute_dtype: torch.dtype
) -> None:
    """Shard `model` in place. Each of `fsdp_groups` names modules that are gathered together, in the order of use.

    A group is gathered for its forward, resharded, and gathered again for its backward; the last group stays gathered,
    since its backward comes next. A group of embeddings is not gathered for its backward, because the gradient of a
    lookup does not need the table. Parameters outside of all groups are gathered once for the whole pass. Parameters
    are cast to `compute_dtype` before they are gathered, inputs are not; gradients are summed in float32, not averaged.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(parameter.shape, mesh.size(-1)))

    # with cast inputs, RoPE would be computed in bf16, and the loss would differ from that of a single process
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded: list[FSDPModule] = []
    for index, names in enumerate(fsdp_groups):
        modules = [model.get_submodule(name) for name in names]
        last = index == len(fsdp_groups) - 1
        fully_shard(
            modules, mesh=mesh, mp_policy=precision, reshard_after_forward=not last, shard_placement_fn=placement
        )
        group: FSDPModule = modules[0]  # type: ignore[assignment]  # fully_shard changed its class, in place
        group.set_unshard_in_backward(not all(isinstance(module, nn.Embedding) for module in modules))
        sharded.append(group)
    root: FSDPModule = fully_shard(
        model, mesh=mesh, mp_policy=precision, reshard_after_forward=False, shard_placement_fn=placement
    )
    for group in (*sharded, root):
        group.set_force_sum_reduction_for_comms(True)
        group.set_gradient_divide_factor(1.0)
    _prefetch_explicitly(root, sharded)


def _prefetch_explicitly(root: FSDPModule, groups: Sequence[FSDPModule]) -> None:
    """Make every group prefetch the next one in the order of use, in forward and backward.

    FSDP2 derives the order of backward from past forwards, which it clears only after the last backward of a step: from
    the second micro-batch on, the first group would prefetch the last group of the previous micro-batch.
    """
    for index, group in enumerate(groups):
        group.set_modules_to_forward_prefetch(list(groups[index + 1 : index + 2]))
        # An empty list selects FSDP2's default, so the first group names itself, which is gathered already.
        group.set_modules_to_backward_prefetch([groups[max(0, index - 1)]])
    root.set_modules_to_backward_prefetch([groups[-1] if groups else root])


def shard_dim(shape: Sequence[int], ranks: int) -> int:
    """Return the dimension along which a parameter is sharded over `ranks`: 0, in shards that may differ by one row.

    For the weights of experts, (E, out, in), it is 1 if `ranks` divides that dimension and not the first.
    """
    return 1 if len(shape) == 3 and shape[0] % ranks and shape[1] % ranks == 0 else 0


def reshard(model: nn.Module) -> None:
    """Release the gathered weights of all groups, so that the next forward gathers the shards as they are then."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class GradSync:
    """Controls when FSDP2 reduces gradients and reshards weights: after every micro-batch, or once per step.

    After every micro-batch: a rank keeps only its shard of weights and gradients between micro-batches; replicas still
    all-reduce once per step. `once_per_step`: weights and float32 gradients stay unsharded for the whole step, so both
    are communicated once. Both modes compute the same sums.
    """

    def __init__(self, model: nn.Module, *, once_per_step: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.model = model if isinstance(model, FSDPModule) else None
        self.once_per_step = once_per_step
        if self.model is not None and once_per_step:
            # Validation then gathers once, not for every batch, and the next step finds the weights gathered.
            self.model.set_reshard_after_forward(False)

    def prepare_backward(self, *, last: bool) -> None:
        """Call before the backward of each micro-batch; `last` is true for the last one of the step."""
        if self.model is None:
            return
        self.model.set_is_last_backward(last)
        if self.once_per_step:
            self.model.set_requires_gradient_sync(last)
            # The optimizer updates the shards, so the gathered weights must be released before.
            self.model.set_reshard_after_backward(last)
        else:
            self.model.set_requires_all_reduce(last)
