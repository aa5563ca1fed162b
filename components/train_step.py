"""One optimizer step: accumulate gradients over micro-batches, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from components.profiler_range import profiler_range


class Ranks(Protocol):
    """Those that see different samples."""

    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def sum(self, tensor: Tensor) -> Tensor: ...


class MicroBatch(Protocol):
    @property
    def tokens(self) -> Tensor:
        """(B, T) int64"""
        ...

    @property
    def labels(self) -> Tensor:
        """(B, T) int64"""
        ...


class Reduction(Protocol):
    def before_backward(self, *, last: bool) -> None: ...


@runtime_checkable
class FollowsBatch(Protocol):
    """An optimizer with constants that depend on the batch."""

    def follow_batch(self, batch_tokens: int) -> None:
        """Called before every step, with its tokens on all ranks."""
        ...


Moments = TypeVar("Moments", covariant=True)


class Meter(Protocol[Moments]):
    """Measures the gradient; components/gradient_moments has one."""

    def start(self, *, measure: bool) -> None: ...
    def end_micro_batch(self) -> None: ...
    def finish(
        self, gradients: Iterable[Tensor], *, groups: int, ranks: int, group_samples: int
    ) -> tuple[Tensor, Moments | None]: ...


class TrainStep(Generic[Moments]):
    """Forward, backward, clip and update, on whatever the model was sharded into.

    The loss of a step is the mean over all tokens of its global batch. Each micro-batch therefore contributes its *sum*
    of token losses over the tokens of the whole step, which is exact for any number of micro-batches and ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        meter: Meter[Moments],
        reduction: Reduction,
        max_grad_norm: float | None,
        arithmetic: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.meter = meter
        self.reduction = reduction
        self.max_grad_norm = max_grad_norm
        self.arithmetic = arithmetic
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._groups = self._group_samples = 0

    def accumulate(
        self, micro_batches: Iterable[MicroBatch], count: int, step_tokens: int, *, measure: bool = False
    ) -> float:
        """Gradients of the mean loss over the step's tokens on all ranks; returns that loss, equal on all ranks.

        `count` is the number of this rank's `micro_batches`, `step_tokens` that of the tokens of all ranks; `measure`
        asks for the moments of the gradient.
        """
        self._groups = count * self.ranks.size
        self.meter.start(measure=measure)
        # Reduced gradients are averaged over the ranks; times the number of ranks they are the sum.
        share = self.ranks.size / step_tokens
        total = torch.zeros((), device=self.ranks.device)
        for number, micro_batch in enumerate(micro_batches, 1):
            tokens = micro_batch.tokens.to(self.ranks.device, non_blocking=True)
            labels = micro_batch.labels.to(self.ranks.device, non_blocking=True)
            with self.arithmetic():
                loss = self.model(tokens, labels)
            self.reduction.before_backward(last=number == count)
            (loss * share).backward()
            self.meter.end_micro_batch()
            total += loss.detach()
            self._group_samples = len(tokens)
        return float(self.ranks.sum(total)) / step_tokens

    def clip(self) -> tuple[float, Moments | None]:
        """Scale the gradients down to max_grad_norm; returns their norm as it was, and the moments if measured."""
        gradients = (parameter.grad for parameter in self.parameters if parameter.grad is not None)
        norm, moments = self.meter.finish(
            gradients, groups=self._groups, ranks=self.ranks.size, group_samples=self._group_samples
        )
        if self.max_grad_norm is not None:
            with profiler_range("clip_gradients"):
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm.float())
        return float(norm), moments

    def update(self, lr: float, step_tokens: int) -> None:
        """One optimizer step of `step_tokens` on all ranks, at `lr` times each group's multiplier."""
        if isinstance(self.optimizer, FollowsBatch):
            self.optimizer.follow_batch(step_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        with profiler_range("optimizer"):
            self.optimizer.step()
            self.discard()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
