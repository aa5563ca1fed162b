"""A step that a probe measures, and the numbers that it records: local sums and maxima, reduced once for all probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from components.gradient_noise.norms import SquaredNorm, local_part


@dataclass
class ProbedStep:
    """One step of one probe. The `record_...` methods never synchronize with the device.

    A tensor that is recorded is this rank's part of a larger one: a DTensor, whose replicas count once, or a plain
    tensor of which other ranks have other parts, such as activations of other samples. Recording a name again adds to
    it. Every rank must record the same names.
    """

    number: int
    """Number of the step, from 1."""
    model: nn.Module
    parameters: Mapping[str, Tensor]
    """The parameters by name; with several processes DTensors, sharded over them."""
    device: torch.device
    micro_batches: int
    """Micro-batches of all data-parallel ranks."""
    micro_batch_size: int
    """Samples of a micro-batch."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """For the probe to keep something until a later point of this step."""
    sampled: int = 0
    """During `watch_forward`: the number of sequences of the current micro-batch that count."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Name -> local sum, float64."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Name -> local maximum, float64."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Name of a sum -> "sum", "norm", "mean" or "rms"; of the latter two the sum is followed by the count."""
    _squares: dict[str, SquaredNorm] = field(default_factory=dict)

    def record_sum(self, name: str, value: Tensor) -> None:
        """Record the sum over all elements of `value` and all ranks."""
        copies, local = local_part(value.detach())
        self._add(name, "sum", local.sum(dtype=torch.float64) / copies)

    def record_norm(self, name: str, tensor: Tensor, *, copies: int = 1) -> None:
        """Record the norm of all elements. `copies` is the number of ranks that hold the same plain tensor."""
        held, local = local_part(tensor.detach())
        self._squares.setdefault(name, SquaredNorm(self.device)).add_local(local, held * copies)

    def record_mean(self, name: str, tensor: Tensor) -> None:
        """Record the mean of all elements."""
        copies, local = local_part(tensor.detach())
        self._add_counted(name, "mean", local.sum(dtype=torch.float64), local.numel(), copies)

    def record_rms(self, name: str, tensor: Tensor) -> None:
        """Record the root mean square of all elements."""
        copies, local = local_part(tensor.detach())
        square = SquaredNorm(self.device)
        square.add(local)
        self._add_counted(name, "rms", square.total(), local.numel(), copies)

    def record_max(self, name: str, tensor: Tensor) -> None:
        """Record the maximum of all elements."""
        _, local = local_part(tensor.detach())
        self.record_maxima(name, local.max() if local.numel() else local.new_full((), -torch.inf))

    def record_maxima(self, name: str, vector: Tensor) -> None:
        """Record the element-wise maximum over all ranks of a plain tensor that has the same shape on each of them.

        `finish` receives it as a tensor, and must not return it.
        """
        value = vector.detach().double()
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def sample(self, tensor: Tensor) -> Tensor:
        """Return the sequences of `tensor`, (B, ...), that are in the sample of this probe, as a local tensor."""
        return local_part(tensor.detach())[1][: self.sampled]

    def flush(self) -> None:
        """Compute the norms that were recorded. Called after each point: later code changes gradients in place."""
        for name, square in self._squares.items():
            self._add(name, "norm", square.total())
        self._squares.clear()

    def values(self, sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the recorded numbers by name, given their reductions over all ranks on the host."""
        found: dict[str, Any] = {}
        for name, kind in self.kinds.items():
            total, *count = sums[name].tolist()
            mean = total / count[0] if count else total
            found[name] = max(mean, 0.0) ** 0.5 if kind in ("norm", "rms") else mean
        for name, value in maxima.items():
            found[name] = value if value.numel() > 1 else float(value)
        return found

    def _add(self, name: str, kind: str, value: Tensor) -> None:
        value = value.reshape(-1)
        self.kinds[name] = kind
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_counted(self, name: str, kind: str, total: Tensor, count: int, copies: int) -> None:
        counted = torch.stack([total, torch.full_like(total, count)])
        self._add(name, kind, counted / copies)
