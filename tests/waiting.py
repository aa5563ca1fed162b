"""A hook that counts what would wait for a GPU while a step is launched, on a CPU and on any layout.

    --hooks.waits.use=tests.waiting:CountWaits --hooks.waits.notes=FILE

Operations whose result is needed on the host are seen by a dispatch mode. The methods below start no operation on a
CPU, where the tensor is on the host already.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from components.train_step import TrainStep
from recipes import pretrain
from recipes.averages import Averages
from recipes.hooks import HookContext

OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}
"""Operations whose result, or its shape, is needed on the host."""
METHODS = ("tolist", "numpy", "cpu")
LAUNCH = (TrainStep, "accumulate"), (pretrain, "nonfinite_flag"), (TrainStep, "update"), (Averages, "update")
"""What queues a step on the device."""


class Waits(TorchDispatchMode):
    """Counts what waits, by its name and the project's function that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor dispatches to plain tensors, which are counted
        if func._opname in OPERATIONS:
            self.add(func._opname)
        return func(*args, **(kwargs or {}))

    def add(self, name: str) -> None:
        frame = sys._getframe(2)
        while "site-packages" in frame.f_code.co_filename and frame.f_back is not None:
            frame = frame.f_back
        self.found[f"{name} in {Path(frame.f_code.co_filename).name}, {frame.f_code.co_name}"] += 1

    def __enter__(self) -> Waits:
        self._patches = ExitStack()
        for name in METHODS:
            self._patches.enter_context(mock.patch.object(Tensor, name, self._counted(name, getattr(Tensor, name))))
        copied = self._counted("tensor", torch.tensor, lambda keys: keys.get("device", "cpu") != "cpu")
        self._patches.enter_context(mock.patch.object(torch, "tensor", copied))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _counted(
        self, name: str, function: Callable[..., Any], waits: Callable[[dict[str, Any]], bool] = lambda keys: True
    ) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            if waits(keys):
                self.add(name)
            return function(*args, **keys)

        return call


@dataclass
class CountWaits:
    """Writes the waits of all steps but the first, which fills caches, and the number of launches watched."""

    notes: Path
    waits: Waits = field(default_factory=Waits, init=False)

    def on_run_begin(self, context: HookContext) -> None:
        self._patches, self.watched = ExitStack(), 0
        for owner, name in LAUNCH:
            launch = getattr(owner, name)

            def counted(*args: Any, launch: Callable[..., Any] = launch, **keys: Any) -> Any:
                if context.clock.step == 0:
                    return launch(*args, **keys)
                self.watched += 1
                with self.waits:
                    return launch(*args, **keys)

            self._patches.enter_context(mock.patch.object(owner, name, counted))

    def on_run_end(self, context: HookContext) -> None:
        self._patches.close()
        if context.rank == 0:
            self.notes.parent.mkdir(parents=True, exist_ok=True)
            self.notes.write_text(json.dumps([self.watched, self.waits.found]))
