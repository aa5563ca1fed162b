"""Hooks that measure the squared gradient norms of a step and of its micro-batches during backward.

A hook on each parameter sees the gradient of every micro-batch before it is accumulated, so no gradient is kept or
computed twice; only two numbers are communicated. The same samples in the same micro-batches give the same measurement
on any number of processes, with FSDP, tensor or context parallelism, and with either `grad_sync` mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.gradient_noise.norms import SquaredNorm
from components.profiler_range import profiler_range


class GradientSum(Protocol):
    """Adds up gradients of which several processes have summands; see components/distributed/context_parallel.py."""

    def add(self, gradient: Tensor) -> Iterable[tuple[Tensor, int]]:
        """Take a gradient, and return parts of the sum: a shard, and the number of processes that hold the same."""
        ...

    def flush(self) -> Iterable[tuple[Tensor, int]]:
        """Return what `add` has not returned."""
        ...

    def whole(self, gradient: Tensor) -> Tensor:
        """Return the sum of one gradient, as a DTensor."""
        ...


class GradientNoiseHooks:
    """Adds up the squared norms of all micro-batch gradients that arrive at some tensors, in steps that are
    measured."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device, summands: GradientSum | None = None) -> None:
        """`tensors` are those that backward writes gradients of; see `backward_parameters`. `summands` adds up the
        gradients of a micro-batch if several processes have summands of them.
        """
        self._device, self._summands = device, summands
        self._squares: SquaredNorm | None = None
        self._seen: set[int] = set()
        self.observer: Callable[[int, Tensor], None] | None = None
        """Also called with every gradient of a measured step, and the index of its tensor in `tensors`. Must not keep
        it."""
        for index, tensor in enumerate(tensors):
            if tensor.requires_grad:
                self._register(index, tensor)

    def start(self, *, measure: bool) -> None:
        """Call before the first backward of a step; `measure` says whether the step is measured."""
        self._squares = SquaredNorm(self._device) if measure else None
        self._seen.clear()

    def end_micro_batch(self) -> None:
        """Call after the backward of every micro-batch."""
        if self._squares is not None:
            with profiler_range("gradient_noise"):
                if self._summands is not None:
                    for shard, copies in self._summands.flush():
                        self._squares.add_local(shard, copies)
                self._squares.flush()

    def sums(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return (2,) float64 on the device, to be summed over all processes of the run. Does not synchronize.

        The first is the squared norm of the step's `gradients`, after their reduction and before clipping; the second
        is the sum over micro-batches of the squared norms of their gradients, 0 in a step that is not measured.
        """
        square, count = SquaredNorm(self._device), 0
        with profiler_range("clip_gradients"):  # clipping needs this norm also in steps that are not measured
            for gradient in gradients:
                square.add(gradient)
                count += 1
            total = square.total()
        if self._squares is None:
            return torch.stack([total, torch.zeros_like(total)])
        if len(self._seen) < count:
            raise RuntimeError(
                f"{count - len(self._seen)} of {count} gradients were not seen by the gradient noise hooks; "
                "check whether the model replaces its parameters"
            )
        return torch.stack([total, self._squares.total()])

    def _register(self, index: int, parameter: Tensor) -> None:
        def add_square(gradient: Tensor) -> Tensor | None:
            if self._squares is None:
                return None
            self._seen.add(index)
            # Under tensor parallelism a gradient may arrive as Partial, or Replicate where the parameter is Shard. A
            # norm needs the placements of the parameter; the reduced gradient is returned, so that autograd keeps it.
            wanted = getattr(parameter, "placements", None)
            reduced = None
            if wanted is not None and gradient.placements != wanted:  # type: ignore[attr-defined]
                reduced = gradient = gradient.redistribute(placements=wanted)  # type: ignore[attr-defined]
            with profiler_range("gradient_noise"):
                if self._summands is not None and self.observer is None:
                    for shard, copies in self._summands.add(gradient):
                        self._squares.add_local(shard, copies)
                else:
                    gradient = gradient if self._summands is None else self._summands.whole(gradient)
                    self._squares.add(gradient)
            if self.observer is not None:
                self.observer(index, gradient)
            return reduced

        parameter.register_hook(add_square)


def backward_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of `named_backward_parameters`."""
    return (tensor for _, tensor in named_backward_parameters(model))


def named_backward_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that backward writes gradients of: the parameters, or under FSDP2 the unsharded parameters.

    `model` is already sharded and materialized.
    """
    if not dist.is_available() or not dist.is_initialized():
        yield from model.named_parameters()
        return
    from torch.distributed.fsdp import FSDPModule

    units: list[tuple[str, Any]] = [each for each in model.named_modules() if isinstance(each[1], FSDPModule)]
    if not units:
        yield from model.named_parameters()
    for prefix, unit in units:
        sharded = {id(parameter) for parameter in unit.parameters()}
        unit.unshard()
        # FSDP2 creates the unsharded parameters once; later passes only allocate their storage, so hooks stay
        for name, parameter in unit.named_parameters(prefix):
            if id(parameter) not in sharded:
                yield name, parameter
        unit.reshard()
