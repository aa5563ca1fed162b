"""One optimizer step: accumulate gradients over micro-batches, clip, update. The host waits for no result here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from components.interfaces import Comm
from components.profiler_range import profiler_range


class MicroBatch(Protocol):
    @property
    def tokens(self) -> Tensor:
        """(B, T) int64"""
        ...

    @property
    def labels(self) -> Tensor:
        """(B, T) int64"""
        ...


class GradientSync(Protocol):
    def before_backward(self, *, last: bool) -> None: ...


@runtime_checkable
class ScalesWithBatch(Protocol):
    """An optimizer with constants that depend on the batch."""

    def follow_batch(self, batch_tokens: int) -> None:
        """Called before every step, with its tokens on all ranks."""
        ...


class NoiseMeter(Protocol):
    """Measures the gradient; components/gradient_noise has one."""

    def start(self, *, measure: bool) -> None: ...
    def end_micro_batch(self) -> None: ...
    def sums(self, gradients: Iterable[Tensor]) -> Tensor: ...


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


class TrainStep:
    """Forward, backward, clip and update, on whatever the model was sharded into.

    The loss of a step is the mean over all tokens of its global batch. Each micro-batch therefore contributes its *sum*
    of token losses over the tokens of the whole step, which is exact for any number of micro-batches and ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Comm,
        world: Comm,
        *,
        meter: NoiseMeter,
        reduction: GradientSync,
        max_grad_norm: float | None,
        compute: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """`ranks` are the processes that see different samples, `world` all of the run, tensor-parallel ones included.

        `compute` gives the context of forward and backward, which provides the weights they compute with.
        """
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.world = world
        self.meter = meter
        self.reduction = reduction
        self.max_grad_norm = max_grad_norm
        self.compute = compute
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @property
    def skips_on_device(self) -> bool:
        """Whether `update` takes `skip`: torch's fused optimizers do, as they do for a GradScaler."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def accumulate(
        self,
        micro_batches: Iterable[MicroBatch],
        count: int,
        step_tokens: int,
        *,
        measure: bool = False,
        more: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> StepNumbers:
        """Gradients of the mean loss over the step's tokens on all ranks, clipped to max_grad_norm.

        `count` is the number of this rank's `micro_batches`, `step_tokens` that of the tokens of all ranks; `measure`
        asks for the squared norms of the micro-batches' gradients. `more` is called after the last backward for further
        summands to be added up over all processes.

        The numbers: `loss` (1,), the sum over the step's tokens; `squares` (2,), those of `Meter.sums`; and `more`.
        """
        self.meter.start(measure=measure)
        # Reduced gradients are averaged over the ranks; times the number of ranks they are the sum.
        share = self.ranks.size / step_tokens
        total = torch.zeros((), device=self.ranks.device)
        with self.compute():
            for number, micro_batch in enumerate(micro_batches, 1):
                tokens = micro_batch.tokens.to(self.ranks.device, non_blocking=True)
                labels = micro_batch.labels.to(self.ranks.device, non_blocking=True)
                loss = self.model(tokens, labels)
                self.reduction.before_backward(last=number == count)
                (loss * share).backward()
                self.meter.end_micro_batch()
                total += loss.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # tensor-parallel neighbours have the same loss
        copies = self.world.size // self.ranks.size
        summands = {"loss": total.double() / copies, "squares": self.meter.sums(gradients), **more()}
        numbers = StepNumbers(summands, self.world.sum)
        if self.max_grad_norm is not None:
            with profiler_range("clip_gradients"):
                self._clip(gradients, numbers["squares"][0].sqrt().float(), self.max_grad_norm)
        return numbers

    def update(self, lr: float, step_tokens: int, *, skip: Tensor | None = None) -> None:
        """One optimizer step of `step_tokens` on all ranks, at `lr` times each group's multiplier.

        Where `skip`, a float32 () on the device, is 1 parameters and optimizer state stay as they are, and the host
        need not know; for optimizers that `skips_on_device`.
        """
        if isinstance(self.optimizer, ScalesWithBatch):
            self.optimizer.follow_batch(step_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        if skip is not None:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        with profiler_range("optimizer"):
            self.optimizer.step()
            self.discard()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self, gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
        """Scale `gradients` of norm `norm` down to `max_norm`, as torch.nn.utils.clip_grads_with_norm_ does.

        On local tensors: for DTensors that takes three times as long to launch.
        """
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        local = [gradient._local_tensor if hasattr(gradient, "_local_tensor") else gradient for gradient in gradients]
        if self.ranks.device.type == "cuda":
            torch._foreach_mul_(local, factor)
            return
        for gradient in local:
            gradient.mul_(factor)


def not_finite(numbers: StepNumbers) -> Tensor:
    """Float32 () on the device: 1 where the loss or the norm of the gradient is not finite, else 0."""
    return (~torch.isfinite(torch.cat([numbers["loss"], numbers["squares"][:1]])).all()).float()
