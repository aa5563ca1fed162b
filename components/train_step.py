"""One optimizer step: accumulate gradients over micro-batches, clip, update, without synchronizing with the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from components.interfaces import Comm
from components.local_tensor import local_tensor
from components.profiler_range import profiler_range


class MicroBatch(Protocol):
    @property
    def tokens(self) -> Tensor:
        """Token ids (B, T), int64."""
        ...

    @property
    def labels(self) -> Tensor:
        """Labels (B, T), int64; -100 is ignored."""
        ...


class GradientSync(Protocol):
    def prepare_backward(self, *, last: bool) -> None: ...


@runtime_checkable
class ScalesWithBatch(Protocol):
    """An optimizer whose constants depend on the batch size."""

    def set_batch_tokens(self, batch_tokens: int) -> None:
        """Called before every step with its number of tokens on all ranks."""
        ...


class NoiseHooks(Protocol):
    """Measures squared gradient norms; see components/gradient_noise/hooks.py."""

    observer: Callable[[int, Tensor], None] | None

    def start(self, *, measure: bool) -> None: ...
    def end_micro_batch(self) -> None: ...
    def sums(self, parameters: Sequence[Tensor]) -> Tensor: ...


class StepSums:
    """Named sums of a step over all processes, float64.

    They stay on the device, where clipping needs them. A copy to the host is started at once, so that `read` waits only
    until the device has reached this point, not for work launched after it.
    """

    def __init__(self, summands: Mapping[str, Tensor], all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """`summands` are this process's values; `all_reduce_sum` sums a tensor over all processes, in place."""
        self._sizes = [summand.numel() for summand in summands.values()]
        # one collective for all of them
        sums = all_reduce_sum(torch.cat([summand.detach().reshape(-1).double() for summand in summands.values()]))
        self._on_device = dict(zip(summands, sums.split(self._sizes), strict=True))
        self._host, self._copied = sums, None
        if sums.is_cuda:
            self._host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._host.copy_(sums, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __getitem__(self, name: str) -> Tensor:
        """Return the sum `name`, (n,) float64 on the device, without synchronizing."""
        return self._on_device[name]

    def read(self) -> dict[str, Tensor]:
        """Return all sums on the host, after waiting until the device has computed them."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._on_device, self._host.split(self._sizes), strict=True))


@dataclass(eq=False, repr=False)
class TrainStep:
    """Forward, backward, clipping and update, under any parallelism.

    The loss of a step is the mean over all tokens of its global batch. Each micro-batch contributes its *sum* of token
    losses divided by the tokens of the whole step, which is exact for any number of micro-batches and ranks.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dp: Comm
    """The group of data-parallel ranks."""
    world: Comm
    """The group of all processes of the run."""
    noise_hooks: NoiseHooks
    grad_sync: GradientSync
    max_grad_norm: float | None
    compute_context: Callable[[], AbstractContextManager[object]]
    """Returns the context manager of forward and backward, such as `WorkingWeights` or autocast."""

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def skips_on_device(self) -> bool:
        """Whether `update` accepts `skip`. torch's fused optimizers support it, for their use with a GradScaler."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def accumulate(
        self,
        micro_batches: Iterable[MicroBatch],
        count: int,
        step_tokens: int,
        *,
        measure: bool = False,
        more: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> StepSums:
        """Compute the gradient of the mean loss over the step's tokens on all ranks, clipped to max_grad_norm.

        `count` is the number of this rank's `micro_batches`, `step_tokens` the number of tokens on all ranks; `measure`
        also measures the squared norms of the micro-batches' gradients. `more` is called after the last backward and
        returns further values to be summed over all processes.

        Returns the sums `loss` (1,), over the step's tokens; `squares`, of `GradientNoiseHooks.sums`; and `more`.
        """
        if isinstance(self.optimizer, ScalesWithBatch):  # before the noise is measured, which uses the constants
            self.optimizer.set_batch_tokens(step_tokens)
        self.noise_hooks.start(measure=measure)
        total = torch.zeros((), device=self.dp.device)
        with self.compute_context():
            for number, micro_batch in enumerate(micro_batches, 1):
                tokens = micro_batch.tokens.to(self.dp.device, non_blocking=True)
                labels = micro_batch.labels.to(self.dp.device, non_blocking=True)
                loss = self.model(tokens, labels)  # (), summed over the B T tokens
                self.grad_sync.prepare_backward(last=number == count)
                (loss / step_tokens).backward()
                self.noise_hooks.end_micro_batch()
                total += loss.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # The CP and TP ranks of a data-parallel rank all have its loss: each contributes a part of it to the sum over
        # the world.
        ranks = self.world.size // self.dp.size
        summands = {"loss": total.double() / ranks, "squares": self.noise_hooks.sums(self.parameters), **more()}
        sums = StepSums(summands, self.world.all_reduce_sum)
        if self.max_grad_norm is not None:
            with profiler_range("clip_gradients"):
                self._clip(gradients, sums["squares"][0].sqrt().float(), self.max_grad_norm)
        return sums

    def update(self, lr: float, *, skip: Tensor | None = None) -> None:
        """Take one optimizer step at `lr` times each group's multiplier, and drop the gradients.

        If `skip`, () float32 on the device, is 1, parameters and optimizer state stay unchanged, without a
        synchronization; it requires `skips_on_device`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        if skip is not None:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        with profiler_range("optimizer"):
            self.optimizer.step()
            self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self, gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
        """Scale `gradients` of norm `norm` down to `max_norm`, as torch.nn.utils.clip_grads_with_norm_ does.

        It works on local tensors, because launching the same on DTensors takes three times as long.
        """
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        local = [local_tensor(gradient) for gradient in gradients]
        if self.dp.device.type == "cuda":
            torch._foreach_mul_(local, factor)
            return
        for gradient in local:
            gradient.mul_(factor)


def nonfinite_flag(sums: StepSums) -> Tensor:
    """Return () float32 on the device: 1 if the loss or the gradient norm is not finite, else 0."""
    return (~torch.isfinite(torch.cat([sums["loss"], sums["squares"][:1]])).all()).float()
