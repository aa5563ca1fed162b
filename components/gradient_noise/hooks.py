"""Measures the gradient of a step and of its micro-batches while they are computed.

The groups of the moments are the micro-batches of all ranks. A hook on each parameter sees the gradient of every
micro-batch before it is added to the others, so nothing is kept and nothing computed twice; two numbers cross the
network. The same samples in the same micro-batches tell the same on any number of processes, sharded or sliced, reduced
after every micro-batch or once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.gradient_noise.norms import SquaredNorm
from components.profiler_range import profiler_range


class GradientNoiseHooks:
    """Squares every gradient that arrives at some tensors, while told to."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        """`tensors` are those that backward reaches; see `backward_parameters`."""
        self._device = device
        self._squares: SquaredNorm | None = None
        self._seen: set[int] = set()
        for number, tensor in enumerate(tensor for tensor in tensors if tensor.requires_grad):
            self._watch(number, tensor)

    def start(self, *, measure: bool) -> None:
        """A step begins; without `measure` its gradients pass unseen."""
        self._squares = SquaredNorm(self._device) if measure else None
        self._seen.clear()

    def end_micro_batch(self) -> None:
        """Call after the backward of every micro-batch."""
        if self._squares is not None:
            with profiler_range("gradient_noise"):
                self._squares.fold()

    def sums(self, gradients: Iterable[Tensor]) -> Tensor:
        """(2,) float64, on the device, to be summed over all processes of the run. Waits for nothing.

        The squared norm of the step's `gradients`, reduced and not clipped yet, and the sum over the micro-batches of
        the squared norms of theirs, which is 0 if they were not measured.
        """
        square, count = SquaredNorm(self._device), 0
        with profiler_range("clip_gradients"):  # its norm is wanted without a measurement too
            for gradient in gradients:
                square.add(gradient)
                count += 1
            total = square.total()
        if self._squares is None:
            return torch.stack([total, torch.zeros_like(total)])
        if len(self._seen) < count:
            raise RuntimeError(
                f"{count - len(self._seen)} of {count} gradients did not pass the hooks that measure them: "
                "does the model replace its parameters?"
            )
        return torch.stack([total, self._squares.total()])

    def _watch(self, number: int, parameter: Tensor) -> None:
        def square(gradient: Tensor) -> Tensor | None:
            if self._squares is None:
                return None
            self._seen.add(number)
            # Tensor parallelism leaves some gradients as sums to be taken, or whole where the parameter is divided.
            wanted = getattr(parameter, "placements", None)
            reduced = None
            if wanted is not None and gradient.placements != wanted:  # type: ignore[attr-defined]
                reduced = gradient = gradient.redistribute(placements=wanted)  # type: ignore[attr-defined]
            with profiler_range("gradient_noise"):
                self._squares.add(gradient)
            return reduced

        parameter.register_hook(square)


def backward_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that gradients arrive at: the parameters, or under FSDP2 what is gathered of them for a pass.

    The model is sharded already and has its storage.
    """
    if not dist.is_available() or not dist.is_initialized():
        yield from model.parameters()
        return
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield from model.parameters()
    for unit in units:
        sharded = {id(parameter) for parameter in unit.parameters()}
        unit.unshard()
        # FSDP2 makes these once, and gives them storage for every pass
        yield from (each for each in unit.parameters() if id(each) not in sharded)
        unit.reshard()
