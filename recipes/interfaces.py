"""The protocols of the components of a recipe. A custom component implements one of them.

A component is a class whose keyword-only constructor parameters are its TOML keys. Objects that exist only at run time
are passed to `build(...)` or to the methods. Any class with these methods fits; it need not derive from the protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from components.interfaces import Tokenizer, UpdateCost
from components.protocol_defaults import with_defaults
from components.tasks import Answer, Question, accuracy_metrics


@runtime_checkable
class TokenizerConfig(Protocol):
    """[tokenizer]"""

    def build(self) -> Tokenizer: ...


@runtime_checkable
class LanguageModel(Protocol):
    """What [model] builds: an `nn.Module` that also has these methods.

    `forward(tokens (B, T))` returns logits (B, T, V), `forward(tokens, labels (B, T))` the summed loss (). Blocks in a
    container named `layers`, if there is one, are compiled, checkpointed and sharded one by one.
    """

    def init_weights(self, seed: int) -> None:
        """Initialize every parameter; its values may depend only on `seed` and its name."""
        ...

    def flops_per_token(self, sequence_length: int) -> float:
        """Return the floating-point operations per trained token, forward and backward."""
        ...

    def lr_multiplier(self, name: str) -> float:
        """Return the factor on the learning rate of the parameter `name`."""
        ...


class ModelDefaults:
    """The members of a model that the dry run and generation use if they exist, with their defaults."""

    vocab_size: int = 0
    """The rows of the embedding; 0: not known."""

    def active_parameters(self) -> int | None:
        """Return the number of matrix parameters in the layers that one token uses; None if it is not known."""
        return None

    def key_value_bytes(self, tokens: int, *, element_bytes: int) -> int:
        """Return the bytes of the keys and values of one layer for `tokens`; 0 if they are not known."""
        return 0

    def loss_bytes(self, tokens: int, *, element_bytes: int, device_type: str, compiled: bool) -> int:
        """Return the bytes of head and loss; by default of float32 logits, log-probabilities and gradients."""
        return 12 * tokens * self.vocab_size

    def use_mkldnn_linear(self) -> None:
        """Store the weights for fast generation on a CPU. They need not support training or saving any more."""


def complete_model(model: nn.Module) -> ModelDefaults:
    """Return the optional members of `model`, with defaults for those that its class does not define."""
    return with_defaults(model, ModelDefaults)


@runtime_checkable
class ReportsMetrics(Protocol):
    """A model that reports metrics."""

    def pop_metric_sums(self) -> Tensor | None:
        """Return the sums over the micro-batches since the last call, (n,) on the device; None if there are none.

        They are summed over all processes of the run, including tensor-parallel ranks, together with the loss of the
        step. Must not synchronize with the device.
        """
        ...

    def metrics_of(self, sums: Tensor) -> Mapping[str, float]:
        """Return the metrics by their names in metrics.jsonl, given the total sums, (n,) float64 on the CPU."""
        ...


@runtime_checkable
class SupportsDocumentMasking(Protocol):
    """A model that supports training.document_masking = true."""

    def enable_document_masking(self, first_input: int) -> None:
        """Mask attention between documents in all later forward passes.

        A document starts at the beginning of a sequence and at every `first_input` token. A token attends only to
        tokens of its document, and positions count from the start of the document.
        """
        ...


@runtime_checkable
class SupportsContextParallelism(Protocol):
    """A model that supports parallel.cp above 1."""

    def enable_context_parallelism(self, shards: Any) -> None:
        """Compute with this rank's part of every sequence in all later forward passes.

        `shards` is a `ContextParallelRanks` (components/distributed/context_parallel.py). `forward` is still given
        whole sequences, and returns their logits or the sum of their losses; the gradient of the loss is this rank's
        summand.
        """
        ...


class ParallelPlan(Protocol):
    """How to shard a model over processes, by the names of its modules."""

    tensor_parallel: Mapping[str, str]
    """Module name, with * for one part of it -> a style of components/distributed/tensor_parallel.py."""
    fsdp_groups: Sequence[Sequence[str]]
    """Groups of modules whose weights are gathered together, in the order of use. All other weights stay gathered."""


@runtime_checkable
class HasParallelPlan(Protocol):
    """A [model] with a parallel plan. A model without one is gathered as a whole and cannot be tensor-parallel."""

    def plan(self, *, tp: int) -> ParallelPlan:
        """Return the plan for `tp` tensor-parallel ranks. Raises ValueError if the model cannot be split among them."""
        ...


@runtime_checkable
class ModelConfig(Protocol):
    """[model]"""

    def build(self, *, vocab_size: int, sequence_length: int) -> nn.Module:
        """Return a `LanguageModel` on the current default device; a recipe builds it on the meta device."""
        ...


@runtime_checkable
class OptimizerConfig(Protocol):
    """[optimizer]"""

    def build(self, *, model: Any) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters of `model`, a `LanguageModel` that is already sharded.

        Each parameter group has a key `lr_multiplier`; `lr` is set before every step. Parameters are DTensors if there
        are several processes.
        """
        ...


@runtime_checkable
class HasUpdateCost(Protocol):
    """An [optimizer] whose update takes matrix products and communication, which `--dry-run` then counts."""

    def update_cost(self, model: Any) -> UpdateCost:
        """Return the cost of one step of `model`, on the meta device and not sharded."""
        ...


@runtime_checkable
class LRSchedule(Protocol):
    """[lr_schedule]: a pure function of tokens, never of steps."""

    def lr(self, tokens: int, batch_tokens: int, total_tokens: int) -> float:
        """Return the learning rate of a step on `batch_tokens` that starts after `tokens` of `total_tokens`."""
        ...


class ScheduleDefaults(LRSchedule):
    """[lr_schedule] with its optional attributes, and their defaults. See `complete_schedule`."""

    max_lr: float | None = None
    """The learning rate after warm-up."""
    warmup_tokens: int = 0
    """Tokens over which the learning rate rises from zero."""
    decay_tokens: int | None = None
    """Length of the decay that ends the run."""
    batch_scaling: str | None = None
    """How the learning rate scales with the batch: "none", "sqrt" or "linear"."""
    reference_batch_tokens: int | None = None
    """Tokens of the batch at which `batch_scaling` is a factor of 1."""


def complete_schedule(schedule: LRSchedule) -> ScheduleDefaults:
    """Return `schedule` with defaults for the attributes that its class does not define."""
    return with_defaults(schedule, ScheduleDefaults)  # type: ignore[type-abstract]


class AnyHook(Protocol):
    """[hooks.NAME], one table for each hook. `use` names a custom class with any of the methods of
    `recipes.hooks:Hook`; the other keys are those of the class."""


class AnyProbe(Protocol):
    """[probes.NAME], one table for each probe. `use` names a class with some of the methods of `recipes.probes:Probe`;
    the other keys are those of the class."""


@runtime_checkable
class BatchConfig(Protocol):
    """[batch]: how many samples each step takes."""

    def build(self, *, schedule: Any, sequence_length: int, total_tokens: int) -> Any:
        """Return a new policy for a run of `total_tokens` under `schedule`: a `components.batch:BatchPolicy`, or an
        object with at least `next_batch_size(progress)`. Must not change this object.

        `schedule` has the attributes of `ScheduleDefaults`. Raises ValueError if the two cannot be combined.
        """
        ...


class WeightAverage(Protocol):
    """What [average.NAME] builds. Tensors are the local shards of this rank, one for each parameter, in one order."""

    @property
    def has_started(self) -> bool:
        """Whether there is an average yet."""
        ...

    def update(self, weights: Sequence[Tensor], *, tokens: int, step_tokens: int) -> None:
        """Called after each optimizer step, of `step_tokens` tokens, that ends at `tokens` of the run.

        Not called for a step that is skipped as bad. On a GPU it is called before the host knows that, and the weights
        are then those of the step before. Must not synchronize with the device.
        """
        ...

    def copy_to(self, weights: Sequence[Tensor]) -> None:
        """Copy the average to `weights`, of any floating-point dtype. Must leave its own state unchanged."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state that is not in tensors, as JSON values."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned."""
        ...


@runtime_checkable
class AverageConfig(Protocol):
    """[average.NAME]: an average of the weights over training, one table for each."""

    num_copies: int
    """The number of float32 copies of the weights that it keeps."""

    def build(self, *, copies: Sequence[Sequence[Tensor]]) -> WeightAverage:
        """Return the average of a run, which keeps its tensors in `copies`: `num_copies` lists of zeros, one for each
        parameter. They are saved and restored with every checkpoint, on any layout."""
        ...


@runtime_checkable
class TaskConfig(Protocol):
    """[tasks.NAME]: questions to evaluate during training, one table for each task."""

    def questions(self) -> Iterable[Question]:
        """Return the questions, equal on all ranks. Raises ValueError or OSError for bad input."""
        ...


class TaskDefaults(TaskConfig):
    """[tasks.NAME] with its optional attributes, and their defaults. See `complete_task`."""

    interval_steps: int | None = None
    """Optimizer steps between evaluations; None: only at the end of the run."""

    def metrics(self, answers: Sequence[Answer]) -> Mapping[str, float]:
        """Return the metrics by name, given the answers to all questions. Called on every rank."""
        return accuracy_metrics(answers)


def complete_task(task: TaskConfig) -> TaskDefaults:
    """Return `task` with defaults for the attributes that its class does not define."""
    return with_defaults(task, TaskDefaults)  # type: ignore[type-abstract]
