"""The numbers of one optimizer step: summed over all processes in one collective, read by the host when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class StepNumbers:
    """Sums of a step by name, float64, equal on all processes.

    They stay on the device, where clipping needs them. A copy for the host is under way from the start, so that reading
    waits for the device to reach this point, and not for what was launched after it.
    """

    def __init__(self, summands: Mapping[str, Tensor], add_up: Callable[[Tensor], Tensor]) -> None:
        """`summands` are this process's; `add_up` sums a tensor over all processes, in place."""
        self._sizes = [summand.numel() for summand in summands.values()]
        sums = add_up(torch.cat([summand.detach().reshape(-1).double() for summand in summands.values()]))
        self._on_device = dict(zip(summands, sums.split(self._sizes), strict=True))
        self._host, self._copied = sums, None
        if sums.is_cuda:
            self._host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._host.copy_(sums, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __getitem__(self, name: str) -> Tensor:
        """(n,) float64 on the device; waits for nothing."""
        return self._on_device[name]

    def read(self) -> dict[str, Tensor]:
        """All of them on the host, once the device has come this far."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._on_device, self._host.split(self._sizes), strict=True))
