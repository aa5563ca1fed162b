"""An optimizer that records every collective between its steps, also with FSDP2 at its defaults."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from components.optimizers import AdamW

KINDS = {
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "allreduce_": "reduce",
    "all_gather_into_tensor": "tp gather",
    "reduce_scatter_tensor": "tp scatter",
    "all_reduce": "tp reduce",
}
"""Operation -> its name in the tests. FSDP2 and torch.distributed call those of c10d, DTensor functional ones."""
FROM_FSDP2 = {
    name: getattr(FSDPModule, name)
    for name in (
        "set_modules_to_backward_prefetch",
        "set_unshard_in_backward",
        "set_reshard_after_forward",
        "set_reshard_after_backward",
    )
}


class Collectives(TorchDispatchMode):
    """Adds (kind, processes, bytes of the larger side) to `seen` for every collective among several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor dispatches to plain tensors, which are counted
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and func._opname != "wait_tensor":
            self._add(func._opname, args, result)
        return result

    def _add(self, name: str, args: Any, result: Any) -> None:
        if name not in KINDS:
            self.seen.append((name, 0, 0))
            return
        if name in ("_allgather_base_", "_reduce_scatter_base_", "allreduce_"):
            group = dist.ProcessGroup.unbox(args[1 if name == "allreduce_" else 2])
        else:
            group = dist.distributed_c10d._resolve_process_group(args[-1])
        if group.size() > 1:
            tensors = [*(args[0] if isinstance(args[0], list) else args[:2]), result]
            size = max(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
            self.seen.append((KINDS[name], group.size(), size))


active: list[Collectives] = []
"""The mode of the last run of this process, removed at the first step of the next."""


@dataclass(frozen=True, kw_only=True)
class CountingAdamW(AdamW):
    """Records the collectives from the end of one step to the end of the next: a line for each step but the first."""

    notes: Path
    """The file that rank 0 writes."""
    plain: bool = False
    """Whether FSDP2 decides by its defaults what to gather and when."""

    def __post_init__(self) -> None:
        for name, setter in FROM_FSDP2.items():
            setattr(FSDPModule, name, (lambda *_, **__: None) if self.plain else setter)

    def build(self, **settings: Any) -> torch.optim.Optimizer:
        optimizer = super().build(**settings)
        mode = Collectives()

        def note(*_: object) -> None:
            if "RANK" not in os.environ:  # the memory estimate takes a step on meta tensors
                return
            if mode not in active:
                while active:
                    active.pop().__exit__(None, None, None)
                active.append(mode)
                mode.__enter__()
            elif os.environ["RANK"] == "0":
                self.notes.parent.mkdir(parents=True, exist_ok=True)
                with self.notes.open("a") as file:
                    file.write(json.dumps(mode.seen) + "\n")
            mode.seen.clear()

        optimizer.register_step_post_hook(note)
        return optimizer
