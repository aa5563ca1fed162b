"""Hooks that measure the squared gradient norms of a step and of its micro-batches during backward.

A hook on each parameter sees the gradient of every micro-batch before it is accumulated, so no gradient is kept or
computed twice; only two numbers are communicated. The same samples in the same micro-batches give the same measurement
on any number of processes, with FSDP, tensor or context parallelism, and with either `grad_sync` mode. Besides the
Euclidean norm it can be made in that of Adam (adam_norm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.gradient_noise.adam_norm import AdamNorm
from components.gradient_noise.norms import SquaredNorm, local_part
from components.profiler_range import profiler_range


class GradientSum(Protocol):
    """Adds up gradients of which several processes have summands; see components/distributed/context_parallel.py."""

    def add(self, local: Tensor, copies: int) -> Iterable[tuple[Tensor, int]]:
        """Take this process's part of a gradient, which `copies` processes hold, and return parts of the sum: a shard,
        and the number of processes that hold the same."""
        ...

    def flush(self) -> Iterable[tuple[Tensor, int]]:
        """Return what `add` has not returned."""
        ...

    def whole(self, gradient: Tensor) -> Tensor:
        """Return the sum of one gradient, as a DTensor."""
        ...


class GradientNoiseHooks:
    """Adds up the squared norms of the micro-batch gradients that arrive at some tensors, in measured steps."""

    def __init__(
        self,
        tensors: Iterable[Tensor],
        device: torch.device,
        summands: Callable[[], GradientSum] | None = None,
        adam: AdamNorm | None = None,
    ) -> None:
        """`tensors` are those that backward writes gradients of; see `named_backward_parameters`. `summands` makes an
        object that adds up the gradients of a micro-batch if several processes have summands of them. With `adam`, the
        noise is also measured in its norm.
        """
        self._device, self._adam = device, adam
        self._l2_sums = None if summands is None else summands()
        self._adam_sums = None if summands is None or adam is None else summands()
        self._l2: SquaredNorm | None = None
        self._in_adam: SquaredNorm | None = None
        self._seen: set[int] = set()
        self.observer: Callable[[int, Tensor], None] | None = None
        """Also called with every gradient of a measured step, and the index of its tensor. Must not keep it."""
        for index, tensor in enumerate(tensors):
            if tensor.requires_grad:
                self._register(index, tensor)

    def start(self, *, measure: bool) -> None:
        """Call before the first backward of a step, on all processes; `measure` says whether the step is measured."""
        self._l2, self._in_adam = SquaredNorm(self._device) if measure else None, None
        if measure and self._adam is not None:
            with profiler_range("gradient_noise"):
                self._in_adam = SquaredNorm(self._device) if self._adam.prepare() else None
        self._seen.clear()

    def end_micro_batch(self) -> None:
        """Call after the backward of every micro-batch."""
        if self._l2 is None:
            return
        with profiler_range("gradient_noise"):
            for squares, summands in ((self._l2, self._l2_sums), (self._in_adam, self._adam_sums)):
                if squares is not None:
                    for shard, copies in () if summands is None else summands.flush():
                        squares.add_local(shard, copies)
                    squares.flush()

    @torch.no_grad()  # or `to_local` of each gradient, a DTensor, would be a function of autograd
    def sums(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return (2,) or (4,) float64 on the device, to be summed over all processes of the run. Does not synchronize.

        The first is the squared norm of the step's gradient, after its reduction and before clipping; the second is the
        sum over micro-batches of the squared norms of their gradients, 0 in a step that is not measured. The others
        are the same in the norm of Adam, if that is measured. `parameters` are those of the model.
        """
        square, count = SquaredNorm(self._device), 0
        with profiler_range("clip_gradients"):  # clipping needs this norm also in steps that are not measured
            for parameter in parameters:
                if parameter.grad is not None:
                    square.add(parameter.grad)
                    count += 1
            total = square.total()
        totals = [total, torch.zeros_like(total)]
        if self._l2 is not None:
            if len(self._seen) < count:
                raise RuntimeError(
                    f"{count - len(self._seen)} of {count} gradients were not seen by the gradient noise hooks; "
                    "check whether the model replaces its parameters"
                )
            totals[1] = self._l2.total()
        if self._in_adam is not None and self._adam is not None:
            with profiler_range("gradient_noise"):
                scaled = SquaredNorm(self._device)
                for parameter in parameters:
                    if parameter.grad is not None:
                        copies, local = local_part(parameter.grad)
                        scaled.add_local(self._adam.scale_sharded(parameter, local), copies)
                totals += [scaled.total(), self._in_adam.total()]
            self._adam.clear()
        self._l2 = self._in_adam = None
        return torch.stack(totals)

    def _register(self, index: int, parameter: Tensor) -> None:
        def add_squares(gradient: Tensor) -> Tensor | None:
            if self._l2 is None:
                return None
            self._seen.add(index)
            # Under tensor parallelism a gradient may arrive as Partial, or Replicate where the parameter is Shard. A
            # norm needs the placements of the parameter; the reduced gradient is returned, so that autograd keeps it.
            wanted = getattr(parameter, "placements", None)
            reduced = None
            if wanted is not None and gradient.placements != wanted:  # type: ignore[attr-defined]
                reduced = gradient = gradient.redistribute(placements=wanted)  # type: ignore[attr-defined]
            with profiler_range("gradient_noise"):
                copies, local = local_part(gradient)
                if self._in_adam is not None and self._adam is not None:
                    _add(self._in_adam, self._adam_sums, self._adam.scale(index, local), copies)
                if self._l2_sums is not None and self.observer is not None:
                    gradient = self._l2_sums.whole(gradient)
                    self._l2.add(gradient)
                else:
                    _add(self._l2, self._l2_sums, local, copies)
            if self.observer is not None:
                self.observer(index, gradient)
            return reduced

        parameter.register_hook(add_squares)


def _add(squares: SquaredNorm, summands: GradientSum | None, local: Tensor, copies: int) -> None:
    """Add a gradient to `squares`, of which other processes may have `summands`."""
    for shard, holders in ((local, copies),) if summands is None else summands.add(local, copies):
        squares.add_local(shard, holders)


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
