"""The plan of a run: everything that is known before it starts, without weights, data or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from components import precision
from components.batch import BatchPolicy, BatchRounding
from components.data.document import ReadStats
from components.data.mixture import Mixture
from components.data.sources.base import TextSource
from components.distributed.parallel_dims import MeshShape
from components.errors import InputError, message_of
from components.gradient_noise import require_preconditioner
from components.hardware import DeviceSpec, device_spec
from components.interfaces import Tokenizer, UpdateCost
from recipes.batch_policy import build_batch_policy
from recipes.config import Config, ConfigError, Problem
from recipes.dry_run.memory import Memory, estimate_memory, syncs_once_per_step
from recipes.dry_run.schedule_preview import SchedulePreview, simulate_schedule
from recipes.errors import config_errors_at
from recipes.interfaces import HasUpdateCost
from recipes.model_setup import build_model, build_tokenizer
from recipes.probes import build_probes
from recipes.recipe import complete_recipe

DEFAULT_MFU = 0.4
"""Model FLOPs utilization if none is given: what good dense pre-training reaches on A100 and H100."""
SAMPLE_CHARACTERS = 1_000_000
"""Characters of text that are tokenized to estimate how many tokens the data holds."""


@dataclass(frozen=True)
class HardwareTarget:
    """The hardware to plan for: a device, if one is named, and its model FLOPs utilization (MFU)."""

    device: DeviceSpec | None = None
    mfu: float = DEFAULT_MFU

    @classmethod
    def parse(cls, text: str) -> HardwareTarget:
        """Parse `H100`, `H100@45%` or `@0.45`. Raises ValueError."""
        name, at, value = text.partition("@")
        mfu = DEFAULT_MFU
        if at:
            try:
                mfu = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
            except ValueError:
                mfu = 0
            if not 0 < mfu <= 1:
                raise ValueError(f"@{value} is not a utilization above 0 and up to 1; write H100@45% or H100@0.45")
        return cls(device_spec(name) if name else None, mfu)

    def per_process(self, local_size: int) -> HardwareTarget:
        """Return the target of one of `local_size` processes of a node: each has a GPU, but they share a CPU."""
        if self.device is None or self.device.name != "cpu":
            return self
        flops, memory = self.device.flops / local_size, self.device.memory_bytes // local_size
        return replace(self, device=replace(self.device, flops=flops, memory_bytes=memory))


@dataclass(frozen=True)
class RunPlan:
    """A run that has not been started."""

    recipe: Any
    target: HardwareTarget
    mesh_shape: MeshShape
    local_size: int
    """Processes of a node."""
    vocab_size: int
    """Vocabulary size of the tokenizer, or of the model where the tokenizer is not available."""
    tokenizer_missing: str
    """Why the tokenizer could not be opened; empty if it could."""
    model: nn.Module
    """The model, on the meta device."""
    batch_rounding: BatchRounding
    policy: BatchPolicy
    """The batch policy, before the first step."""
    schedule: SchedulePreview
    dtype: torch.dtype
    """The dtype of the matrix products."""
    update_cost: UpdateCost | None
    """The cost of an optimizer step; None for element-wise updates."""
    memory: Memory | str
    """The memory estimate, or the reason why there is none."""
    epoch_tokens: int | None
    """Tokens of the data, estimated from its beginning; None where it is not available."""

    @property
    def flops_per_token(self) -> float:
        model: Any = self.model
        return float(model.flops_per_token(self.recipe.training.sequence_length))

    @property
    def flops(self) -> float:
        """FLOPs of the whole run, as in MFU: what activation checkpointing recomputes is not counted."""
        return self.flops_per_token * self.schedule.tokens

    def syncs_once_per_step(self, memory: Memory, device: DeviceSpec) -> bool:
        """Return whether a run on `device` keeps weights and gradient whole for a step."""
        return syncs_once_per_step(self.recipe.training.grad_sync, memory.local_peak, device.memory_bytes)

    def peak_on(self, memory: Memory, device: DeviceSpec) -> int:
        """Return the bytes that a rank needs on `device`."""
        return memory.local_peak if self.syncs_once_per_step(memory, device) else memory.peak

    def seconds_on(self, device: DeviceSpec) -> float:
        """Return the time of the run on as many `device`s as it has processes."""
        return self.flops / (device.flops * self.target.mfu * self.mesh_shape.world_size)


def make_plan(config: Config, world_size: int, target: HardwareTarget, local_size: int | None = None) -> RunPlan:
    """Plan a run of `world_size` processes, `local_size` on each node (by default all on one).

    Raises ConfigError with every problem that makes a plan impossible.
    """
    local_size = local_size or world_size
    target = target.per_process(local_size)
    recipe, training = config.recipe, config.recipe.training
    problems: list[Problem] = []
    mesh_shape, tokenizer, vocab_size, missing, model = MeshShape(1, world_size, 1, 1), None, 0, "", None
    update_cost: UpdateCost | None = None
    with _collect_problems(config, "parallel", problems):
        mesh_shape = recipe.parallel.mesh_shape(world_size, local_size)
    with _collect_problems(config, "tokenizer", problems):
        tokenizer, vocab_size, missing = _open_tokenizer(recipe)
    if vocab_size:
        with _collect_problems(config, "model", problems):
            model = build_model(config, vocab_size)
            model.flops_per_token(training.sequence_length)  # fail here, at [model], and not in the report
    if model is not None:
        with _collect_problems(config, "optimizer", problems):
            update_cost = recipe.optimizer.update_cost(model) if isinstance(recipe.optimizer, HasUpdateCost) else None
        with _collect_problems(config, "gradient_noise.norms", problems):
            if "adam" in recipe.gradient_noise.norms:
                require_preconditioner(recipe.optimizer.build(model=model))
        with _collect_problems(config, "probes", problems):
            if complete_recipe(recipe).probes:
                build_probes(config, model)
    rounding = BatchRounding(training.micro_batch_size, mesh_shape.dp_size)
    schedule, policy = SchedulePreview(), None
    with _collect_problems(config, "batch", problems):
        policy = build_batch_policy(recipe)
        schedule = simulate_schedule(recipe, rounding)
    if problems or model is None or policy is None:
        raise ConfigError(problems)
    device_type, dtype = _device_type_and_dtype(recipe, target)
    return RunPlan(
        recipe=recipe,
        target=target,
        mesh_shape=mesh_shape,
        local_size=local_size,
        vocab_size=vocab_size,
        tokenizer_missing=missing,
        model=model,
        batch_rounding=rounding,
        policy=policy,
        schedule=schedule,
        dtype=dtype,
        update_cost=update_cost,
        memory=estimate_memory(recipe, model, mesh_shape, device_type, dtype),
        epoch_tokens=estimate_epoch_tokens(recipe.data, tokenizer),
    )


def _open_tokenizer(recipe: Any) -> tuple[Tokenizer | None, int, str]:
    """Return the tokenizer, its vocabulary size, and why it is missing: empty if it is not.

    Of a missing one, the vocabulary size is that of [model]. Raises InputError if that is not set either.
    """
    try:
        tokenizer = build_tokenizer(recipe)
        return tokenizer, tokenizer.vocab_size, ""
    except FileNotFoundError as error:
        missing = message_of(error)
        if vocab_size := getattr(recipe.model, "vocab_size", None):
            return None, vocab_size, missing
        message = f"{missing}; set model.vocab_size for a dry run without it"
        raise InputError(getattr(error, "key", ""), message) from error


def estimate_epoch_tokens(data: Any, tokenizer: Any) -> int | None:
    """Estimate the tokens of the data by the tokens per stored byte of its first documents; None if it is not here."""
    if isinstance(data, Mixture):
        parts = [estimate_epoch_tokens(source, tokenizer) for source in data.sources.values()]
        return None if None in parts else sum(filter(None, parts))
    if tokenizer is None or not isinstance(data, TextSource):
        return None
    log, tokens, characters = ReadStats(), 0, 0
    try:
        size = data.size_bytes()
        if not size:  # unknown, and reading it may need the network
            return None
        for document in data.documents(log):
            tokens += len(tokenizer.encode_batch([document.text])[0]) + document.complete
            characters += len(document.text)
            if characters > SAMPLE_CHARACTERS and log.source_bytes:
                return tokens * size // log.source_bytes
    except (OSError, ValueError):
        return None
    return tokens


@contextmanager
def _collect_problems(config: Config, path: str, problems: list[Problem]) -> Iterator[None]:
    """Add the errors of the block, reported at `path`, to `problems`."""
    try:
        with config_errors_at(config, path):
            yield
    except ConfigError as error:
        problems += error.problems


def _device_type_and_dtype(recipe: Any, target: HardwareTarget) -> tuple[str, torch.dtype]:
    """Return the device type and precision: a GPU with bf16, unless the recipe or the target says CPU."""
    if recipe.run.device == "cpu" or (target.device is not None and target.device.name == "cpu"):
        return "cpu", precision.dtype_of(precision.resolve_precision(recipe.training.precision, torch.device("cpu")))
    return "cuda", torch.float32 if recipe.training.precision == "float32" else torch.bfloat16
