"""Checks before a run starts: what would fail, and what may not be intended.

An *error* makes the run impossible on any machine with that many processes, or on the device that was named. A file
that is missing on this machine is a warning, since the run may start on another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from components.batch import BatchPolicy
from components.clock import TrainingClock
from components.errors import InputError, message_of
from components.run_directory import RunDirectory
from components.tasks import check_questions
from components.units import format_count
from recipes.dry_run.memory import PLANNED_FRACTION, Memory
from recipes.dry_run.plan import RunPlan
from recipes.interfaces import complete_model, complete_schedule, complete_task
from recipes.prepared_data import text_sources
from recipes.recipe import complete_recipe

MIN_WARMUP_STEPS = 3
"""With fewer steps of warm-up the learning rate jumps to its peak rather than rising to it."""

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One result of the checks."""

    level: Level
    key: str
    """Dotted path of the key to change."""
    message: str


def preflight_checks(plan: RunPlan) -> Iterator[Finding]:
    """Yield all findings, errors first."""
    local_checks = (_text, _initial_weights, _run_directory)
    checks = (_memory, *local_checks, _eager, _batch, _schedule, _intervals, _vocabulary, _tasks)
    found = [finding for check in checks for finding in check(plan)]
    for level in ("error", "warning", "note"):
        yield from (finding for finding in found if finding.level == level)


def _memory(plan: RunPlan) -> Iterator[Finding]:
    device, memory = plan.target.device, plan.memory
    if device is None or isinstance(memory, str):
        return
    needed = plan.peak_on(memory, device)
    if needed > PLANNED_FRACTION * device.memory_bytes:
        level: Level = "error" if needed > device.memory_bytes else "warning"
        message = f"a rank needs some {needed / 1e9:,.0f} GB and {device.name} has {device.memory_bytes / 1e9:,.0f} GB"
        yield Finding(level, "training.micro_batch_size", f"{message}; {_memory_remedy(plan, memory)}")


def _memory_remedy(plan: RunPlan, memory: Memory) -> str:
    """Return the setting that would save most memory, judging by the largest part."""
    device = plan.target.device
    if device is not None and plan.peak_on(memory, device) > memory.peak <= PLANNED_FRACTION * device.memory_bytes:
        return 'set training.grad_sync = "auto"'
    parts = {name: size for name, (size, _) in memory.parts.items()}
    if parts["activations"] > parts["parameters"] + parts["gradients"] + parts["optimizer state"]:
        smaller = "use a smaller micro-batch" if plan.recipe.training.micro_batch_size > 1 else "set parallel.cp"
        if plan.recipe.training.activation_checkpoint != "full":
            return f'set training.activation_checkpoint = "full", or {smaller}'
        return f"{smaller}, or parallel.tp, or use a shorter sequence"
    if plan.mesh_shape.dp_replicate > 1:
        return f"set parallel.dp_shard = {plan.mesh_shape.dp_size}, or parallel.tp"
    return "shard over more processes, or set parallel.tp"


def _text(plan: RunPlan) -> Iterator[Finding]:
    if plan.tokenizer_missing:
        yield _missing_here("tokenizer.path", plan.tokenizer_missing)
    for key, source in text_sources(plan.recipe).items():
        try:
            source.size_bytes()
        except FileNotFoundError as error:
            yield _missing_here(f"{key}.path", message_of(error))
        except (OSError, ValueError) as error:
            yield Finding("warning", f"{key}.path", message_of(error))


def _initial_weights(plan: RunPlan) -> Iterator[Finding]:
    if (weights := plan.recipe.run.init_from) is None:
        return
    from recipes.initial_weights import check_initial_weights  # imports all models

    try:
        for warning in check_initial_weights(plan.model, weights):
            yield Finding("warning", "run.init_from", warning)
    except FileNotFoundError as error:
        yield _missing_here("run.init_from", message_of(error))
    except ValueError as error:
        yield Finding("error", "run.init_from", message_of(error))


def _run_directory(plan: RunPlan) -> Iterator[Finding]:
    directory = RunDirectory(plan.recipe.run.directory)
    if foreign := directory.unowned_files():
        message = f"{directory.path} holds {', '.join(foreign)}, which no run wrote; move them away"
        yield Finding("warning", "run.name", message)
    if not directory.has_run:
        return
    if plan.recipe.run.if_exists == "replace":
        yield Finding("note", "run.name", f"{directory.path} already holds a run, which will be replaced")
    else:
        message = f"{directory.path} already holds a run; a new one needs another --run.name, or use --resume"
        yield Finding("warning", "run.name", message)


def _missing_here(key: str, message: str) -> Finding:
    return Finding("warning", key, f"not on this machine, but needed for training: {message}")


def _eager(plan: RunPlan) -> Iterator[Finding]:
    device = torch.device("cpu" if plan.recipe.run.device == "cpu" else "cuda")
    if (why := plan.recipe.training.slow_eager(device, plan.mesh_shape.tp)) is not None:
        yield Finding("warning", "training.compile", why)


def _batch(plan: RunPlan) -> Iterator[Finding]:
    rounding, policy = plan.batch_rounding, plan.policy
    for requested, samples in list(plan.schedule.rounded_batches.items())[:3]:
        level: Level = "warning" if samples > 1.1 * requested else "note"
        yield Finding(level, "batch", f"{requested} samples become {samples}: a multiple of {rounding}")
    if policy.is_adaptive:
        yield from _adaptive_batch(plan, policy)
    largest = plan.schedule.largest_batch if policy.max_size is None else rounding.round_up(policy.max_size).samples
    epoch = plan.epoch_tokens and plan.epoch_tokens // plan.recipe.training.sequence_length
    if epoch and largest > epoch:
        message = (
            f"the data has about {epoch:,} sequences, so a step of {largest:,} would use some of them more than once"
        )
        yield Finding("warning", "batch" if policy.max_size is None else _batch_key(plan, "max_size"), message)


def _adaptive_batch(plan: RunPlan, policy: BatchPolicy) -> Iterator[Finding]:
    """Check sizes that the simulated schedule does not reach, because nothing is measured."""
    rounding, training = plan.batch_rounding, plan.recipe.training
    initial = policy.next_batch_size(TrainingClock(training.total_tokens, training.sequence_length))
    smallest = initial if policy.min_size is None else policy.min_size
    measurable = {size: rounding.can_measure_noise(rounding.round_up(size)) for size in (initial, smallest)}
    remedy = f"use {2 * rounding.samples_per_micro_step} or a smaller micro-batch"
    if not measurable[initial]:  # the run refuses it
        message = "gradient noise needs at least 2 micro-batches per step, so the batch could never change"
        yield Finding("error", _batch_key(plan, "initial_size"), f"{message}; {remedy}")
    elif not measurable[smallest]:
        message = (
            "gradient noise needs at least 2 micro-batches per step, so the batch could never grow again from here"
        )
        yield Finding("warning", _batch_key(plan, "min_size"), f"{message}; {remedy}")
    unknown = f"{type(plan.recipe.batch).__name__} depends on the gradient noise, which is unknown before training"
    most = -(-training.total_tokens // (rounding.round_up(smallest).samples * training.sequence_length))
    if (maximum := policy.max_size) is None:
        yield Finding("note", "batch", f"{unknown}: up to {most:,} steps")
        return
    largest = rounding.round_up(maximum).samples
    if largest != maximum:
        yield Finding(
            "warning", _batch_key(plan, "max_size"), f"{maximum} samples become {largest}: a multiple of {rounding}"
        )
    elif policy.multiple_of % rounding.samples_per_micro_step:
        message = f"{policy.multiple_of} is not a multiple of {rounding}, to which sizes will be rounded up"
        yield Finding("note", _batch_key(plan, "multiple_of"), message)
    fewest = -(-training.total_tokens // (largest * training.sequence_length))
    yield Finding("note", "batch", f"{unknown}: {fewest:,} to {most:,} steps")


def _batch_key(plan: RunPlan, name: str) -> str:
    """Return the key `name` of [batch], or the section for a batch policy without such a key."""
    return f"batch.{name}" if hasattr(plan.recipe.batch, name) else "batch"


def _schedule(plan: RunPlan) -> Iterator[Finding]:
    recipe, schedule = plan.recipe, plan.schedule
    total = recipe.training.total_tokens
    lr_schedule = complete_schedule(recipe.lr_schedule)
    warmup = lr_schedule.warmup_tokens
    if schedule.invalid_lr is not None:
        step, lr = schedule.invalid_lr
        yield Finding("error", "lr_schedule", f"the learning rate of step {step} is {lr}; it must be finite and >= 0")
    if schedule.zero_lr_from is not None and schedule.zero_lr_from < 0.99 * total:
        rest = format_count(total - schedule.zero_lr_from)
        yield Finding("warning", "lr_schedule", f"the learning rate of the last {rest} tokens is zero")
    if warmup and schedule.warmup_steps < MIN_WARMUP_STEPS:
        yield Finding("warning", "lr_schedule.warmup_tokens", f"the warm-up takes only {schedule.warmup_steps} steps")
    decay = lr_schedule.decay_tokens or 0
    if warmup + decay > total:
        message = f"warm-up and decay, {format_count(warmup + decay)} tokens, overlap in a run of {format_count(total)}"
        yield Finding("warning", "lr_schedule.decay_tokens", message)
    elif 4 * warmup > total:
        yield Finding("warning", "lr_schedule.warmup_tokens", f"the warm-up is {warmup / total:.0%} of the run")
    if plan.epoch_tokens and total > plan.epoch_tokens:
        yield Finding("note", "training.total_tokens", f"{total / plan.epoch_tokens:.3g} epochs of the data")


def _intervals(plan: RunPlan) -> Iterator[Finding]:
    steps, interval = plan.schedule.num_steps, plan.recipe.checkpoint.interval_steps
    key = "checkpoint.interval_steps"
    if interval is None:
        yield Finding("warning", key, f"unset: nothing is saved before the last of {steps} steps")
    elif interval >= steps:
        message = f"{interval} is not below the {steps} steps of the run: nothing is saved before its end"
        yield Finding("warning", key, message)
    validation = complete_recipe(plan.recipe).validation
    if validation is not None and (validation.interval_steps or 0) >= steps:
        message = f"{validation.interval_steps} is not below the {steps} steps of the run: one validation, at its end"
        yield Finding("warning", "validation.interval_steps", message)


def _vocabulary(plan: RunPlan) -> Iterator[Finding]:
    rows = complete_model(plan.model).vocab_size
    if not plan.tokenizer_missing and rows > plan.vocab_size:
        message = f"{rows - plan.vocab_size} of {rows} rows have no id in the tokenizer"
        yield Finding("note", "model.vocab_size", message)


def _tasks(plan: RunPlan) -> Iterator[Finding]:
    """Read the questions of every task."""
    steps = plan.schedule.num_steps
    for name, task in complete_recipe(plan.recipe).tasks.items():
        key = f"tasks.{name}"
        try:
            check_questions(task.questions())
        except (OSError, ValueError) as error:
            at = InputError.below(key, error)
            is_missing = isinstance(error, FileNotFoundError)
            yield _missing_here(at.key, at.message) if is_missing else Finding("error", at.key, at.message)
        interval = complete_task(task).interval_steps
        if (interval or 0) >= steps:
            message = f"{interval} is not below the {steps} steps of the run: one evaluation, at its end"
            yield Finding("warning", f"{key}.interval_steps", message)
