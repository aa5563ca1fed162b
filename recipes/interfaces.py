"""What the recipes ask of a component: the protocols to satisfy when you bring your own.

A component is a class whose keyword-only constructor parameters are its TOML keys. What exists only at run time reaches
it through `build(...)` or as an argument of the method. Any class with these methods fits, wherever it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from components.defaults import with_defaults
from components.interfaces import Tokenizer


@runtime_checkable
class TokenizerConfig(Protocol):
    """[tokenizer]"""

    def build(self) -> Tokenizer: ...


@runtime_checkable
class LanguageModel(Protocol):
    """What [model] builds: an `nn.Module` with these methods besides.

    Its `forward(tokens (B, T))` gives logits (B, T, V), and `forward(tokens, labels (B, T))` the summed loss (). Blocks
    in a container named `layers`, if it has one, are compiled and checkpointed one by one.
    """

    def init_weights(self, seed: int) -> None:
        """Fill every parameter from (seed, its name) alone."""
        ...

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations per trained token, forward and backward."""
        ...

    def lr_multiplier(self, name: str) -> float:
        """Factor on the learning rate of the parameter `name`."""
        ...


@runtime_checkable
class ReportsMetrics(Protocol):
    """A model with metrics of its own."""

    def pop_metric_sums(self) -> Tensor | None:
        """Sums over the micro-batches since the last call, (n,) on the device; None if there are none.

        They are added up over all processes of the run, tensor-parallel ones included, with the other numbers of the
        step. Must not wait for the device.
        """
        ...

    def metrics_of(self, sums: Tensor) -> Mapping[str, float]:
        """The metrics by their names in metrics.jsonl, from those sums, (n,) float64 on the CPU."""
        ...


@runtime_checkable
class SupportsDocumentMasking(Protocol):
    """A model that can keep the documents of a sequence apart, for training.document_masking = true."""

    def enable_document_masking(self, end_of_document: int) -> None:
        """From now on every `end_of_document` among the tokens of a forward pass starts a document, and so does the
        beginning of a sequence: no token sees one of another document, and positions count from the start of its own.
        """
        ...


class ParallelPlan(Protocol):
    """How a model is divided among processes, by the names of its modules."""

    tensor_parallel: Mapping[str, str]
    """Module name, with * for one part of it, to a style of components/distributed/tensor_parallel.py."""
    fsdp_groups: Sequence[Sequence[str]]
    """Groups of modules whose weights are gathered together, in the order of use. The rest is gathered for all."""


@runtime_checkable
class HasParallelPlan(Protocol):
    """A [model] that says how it is divided. One that does not is gathered whole, and cannot be tensor-parallel."""

    def plan(self, *, tp: int) -> ParallelPlan:
        """Raises ValueError if it cannot be divided among `tp` tensor-parallel ranks."""
        ...


@runtime_checkable
class ModelConfig(Protocol):
    """[model]"""

    def build(self, *, vocab_size: int, sequence_length: int) -> nn.Module:
        """A `LanguageModel`, on whatever device is current: the recipe builds it on the meta device."""
        ...


@runtime_checkable
class OptimizerConfig(Protocol):
    """[optimizer]"""

    def build(
        self, *, parameters: Iterable[tuple[str, nn.Parameter]], lr_multiplier: Callable[[str], float]
    ) -> torch.optim.Optimizer:
        """Parameter groups by name; each group carries `lr_multiplier`, and `lr` is set before every step."""
        ...


@runtime_checkable
class LRSchedule(Protocol):
    """[lr_schedule]: a pure function of tokens, never of steps."""

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float:
        """Learning rate of a step of `batch_tokens` that starts after `tokens` of `total_tokens` were trained."""
        ...


class ScheduleDefaults:
    """What [lr_schedule] may define beside `lr`, and what holds for a class that does not. See `complete_schedule`."""

    max_lr: float | None = None
    """The learning rate after warm-up."""
    warmup_tokens: int = 0
    """Tokens over which the learning rate rises from zero."""
    decay_tokens: int | None = None
    """Length of the decay that ends the run."""
    batch_scaling: str | None = None
    """How the learning rate follows the batch: "none", "sqrt" or "linear"."""
    reference_batch_tokens: int | None = None
    """Tokens of the batch for which `batch_scaling` is a factor of 1."""

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float:
        """See `LRSchedule.lr`."""
        raise NotImplementedError


def complete_schedule(schedule: LRSchedule) -> ScheduleDefaults:
    """Return `schedule` with the defaults of what its class does not define."""
    return with_defaults(schedule, ScheduleDefaults)


class AnyHook(Protocol):
    """A table for each hook, [hooks.NAME], whose `use` names a class of yours with any of the methods of
    `recipes.hooks:Hook`. Its other keys are those of the class."""


@runtime_checkable
class BatchConfig(Protocol):
    """[batch]: how many samples each step takes."""

    def build(self, *, schedule: Any, sequence_length: int, total_tokens: int) -> Any:
        """Return a new policy for a run of `total_tokens` under `schedule`: a `components.batch:BatchPolicy`, or an
        object with at least `next_batch_size(progress)`. The keys of [batch] stay as they are.

        `schedule` has the attributes of `ScheduleDefaults`. Raises ValueError where the two do not go together.
        """
        ...
