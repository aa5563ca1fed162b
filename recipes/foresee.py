"""What would go wrong, or not as meant: told before anything is started.

An *error* makes the run impossible on any machine with that many processes, or on the device that was named. What is
only missing on this machine is a warning: the run may start on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from components.batch import BatchPolicy
from components.clock import Clock
from components.data.mixture import sources_in
from components.data.sources.base import TextSource
from components.errors import message_of
from components.run_directory import RunDirectory
from components.units import format_count
from recipes.contracts import complete_schedule
from recipes.memory_estimate import PLANNED, Memory
from recipes.plan import Plan

FEW_STEPS = 3
"""A warm-up of fewer steps jumps to its rate rather than rising to it."""

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Foreseen:
    """One thing that will happen."""

    level: Level
    key: str
    """Dotted path of the key to change."""
    message: str


def foresee(plan: Plan) -> Iterator[Foreseen]:
    """Everything worth saying, what makes the run impossible first."""
    found = [
        *_memory(plan),
        *_here(plan),
        *_eager(plan),
        *_batch(plan),
        *_schedule(plan),
        *_intervals(plan),
        *_vocabulary(plan),
    ]
    for level in ("error", "warning", "note"):
        yield from (item for item in found if item.level == level)


def _memory(plan: Plan) -> Iterator[Foreseen]:
    device, memory = plan.claim.device, plan.memory
    if device is None or isinstance(memory, str):
        return
    needed = plan.peak_on(memory, device)
    told = f"a rank needs some {needed / 1e9:,.0f} GB and {device.name} has {device.memory_bytes / 1e9:,.0f} GB"
    if needed > PLANNED * device.memory_bytes:
        level: Level = "error" if needed > device.memory_bytes else "warning"
        yield Foreseen(level, "training.micro_batch_size", f"{told}; {_remedy(plan, memory)}")


def _remedy(plan: Plan, memory: Memory) -> str:
    """What would save most, from what takes most."""
    device = plan.claim.device
    if device is not None and plan.peak_on(memory, device) > memory.peak <= PLANNED * device.memory_bytes:
        return 'set training.accumulation = "auto"'
    parts = {name: size for name, (size, _) in memory.parts.items()}
    held = parts["parameters"] + parts["gradients"] + parts["optimizer state"]
    if parts["activations"] > held:
        if plan.recipe.training.activation_checkpoint != "full":
            return 'set training.activation_checkpoint = "full", or a smaller micro-batch'
        return "take a smaller micro-batch, a shorter sequence or parallel.tp"
    if plan.sizes.dp_replicate > 1:
        return f"set parallel.dp_shard = {plan.sizes.dp_size}, or parallel.tp"
    return "shard over more processes, or set parallel.tp"


def _here(plan: Plan) -> Iterator[Foreseen]:
    """What this machine lacks, or has already."""
    recipe = plan.recipe
    if plan.tokenizer_missing:
        yield Foreseen("warning", "tokenizer.path", _absent(plan.tokenizer_missing))
    validation = getattr(recipe, "validation", None)
    sections = sources_in("data", recipe.data) | sources_in("validation.data", getattr(validation, "data", None))
    for key, data in sections.items():
        if isinstance(data, TextSource):
            try:
                data.size_bytes()
            except FileNotFoundError as error:
                yield Foreseen("warning", f"{key}.path", _absent(message_of(error)))
            except (OSError, ValueError) as error:
                yield Foreseen("warning", f"{key}.path", message_of(error))
    if (weights := recipe.run.init_from) is not None:
        from recipes.initial_weights import check_initial_weights  # brings all models along

        try:
            for warning in check_initial_weights(plan.model, weights):
                yield Foreseen("warning", "run.init_from", warning)
        except FileNotFoundError as error:
            yield Foreseen("warning", "run.init_from", _absent(str(error)))
        except ValueError as error:
            yield Foreseen("error", "run.init_from", str(error))
    directory = recipe.run.directory
    if foreign := RunDirectory(directory).foreign():
        yield Foreseen(
            "warning", "run.name", f"{directory} holds {', '.join(foreign)}, which no run wrote; move them away"
        )
    if RunDirectory(directory).used:
        fate = "will be replaced" if recipe.run.if_exists == "replace" else "stops a new one; --resume or --run.name"
        level: Level = "note" if recipe.run.if_exists == "replace" else "warning"
        yield Foreseen(level, "run.name", f"{directory} already holds a run, which {fate}")


def _eager(plan: Plan) -> Iterator[Foreseen]:
    device = torch.device("cpu" if plan.recipe.run.device == "cpu" else "cuda")
    if (why := plan.recipe.training.slow_eager(device, plan.sizes.tp)) is not None:
        yield Foreseen("warning", "training.compile", f'{why}; leave it at "auto"')


def _absent(message: str) -> str:
    return f"not on this machine, and needed to train: {message}"


def _batch(plan: Plan) -> Iterator[Foreseen]:
    layout = plan.layout
    for requested, samples in list(plan.course.rounded.items())[:3]:
        unit = f"{layout.dp_size} ranks x {layout.micro_batch_size} a micro-batch"
        level: Level = "warning" if samples > 1.1 * requested else "note"
        yield Foreseen(level, "batch", f"{requested} samples become {samples}: a multiple of {unit}")
    policy = plan.policy
    if policy.is_adaptive:
        training = plan.recipe.training
        initial = policy.next_batch_size(Clock(training.total_tokens, training.sequence_length))
        smallest = initial if policy.min_size is None else policy.min_size
        shows = {size: layout.shows_noise(layout.fit(size)) for size in (initial, smallest)}
        remedy = f"take {2 * layout.unit} or a smaller micro-batch"
        if not shows[initial]:  # the run refuses it
            message = "a step of one micro-batch does not show its noise, so the batch could never change"
            yield Foreseen("error", "batch.initial", f"{message}; {remedy}")
        elif not shows[smallest]:
            message = "a step of one micro-batch does not show its noise, so the batch would stay there for good"
            yield Foreseen("warning", "batch.minimum", f"{message}; {remedy}")
        yield from _adaptive(plan, policy, smallest)
    largest = plan.course.largest if policy.max_size is None else layout.fit(policy.max_size).samples
    epoch = plan.epoch_tokens and plan.epoch_tokens // plan.recipe.training.sequence_length
    if epoch and largest > epoch:
        message = f"the data has some {epoch:,} sequences, so a step of {largest:,} would see them more than once"
        yield Foreseen("warning", "batch.maximum" if policy.is_adaptive else "batch", message)


def _adaptive(plan: Plan, policy: BatchPolicy, smallest: int) -> Iterator[Foreseen]:
    """What the course, played with nothing measured, does not show."""
    layout, training, name = plan.layout, plan.recipe.training, type(plan.recipe.batch).__name__
    unit = f"{layout.unit} = {layout.dp_size} ranks x {layout.micro_batch_size} a micro-batch"
    most = -(-training.total_tokens // (layout.fit(smallest).samples * training.sequence_length))
    if (maximum := policy.max_size) is None:
        yield Foreseen("note", "batch", f"what {name} will measure is not known: up to {most:,} steps, by its batch")
        return
    largest = layout.fit(maximum).samples
    if largest != maximum:
        yield Foreseen("warning", "batch.maximum", f"{maximum} samples become {largest}: a multiple of {unit}")
    elif policy.multiple_of % layout.unit:
        message = f"{policy.multiple_of} is no multiple of {unit}, to which sizes will be rounded up"
        yield Foreseen("note", "batch.quantum", message)
    fewest = -(-training.total_tokens // (largest * training.sequence_length))
    yield Foreseen(
        "note",
        "batch",
        f"what {name} will measure is not known: {fewest:,} to {most:,} steps, by its batch",
    )


def _schedule(plan: Plan) -> Iterator[Foreseen]:
    recipe, course = plan.recipe, plan.course
    total = recipe.training.total_tokens
    schedule = complete_schedule(recipe.lr_schedule)
    warmup = schedule.warmup_tokens
    if course.bad_rate is not None:
        step, lr = course.bad_rate
        yield Foreseen("error", "lr_schedule", f"the rate of step {step} is {lr}")
    if course.zero_from is not None and course.zero_from < 0.99 * total:
        rest = format_count(total - course.zero_from)
        yield Foreseen("warning", "lr_schedule", f"the last {rest} tokens would be trained at a rate of zero")
    if warmup and course.warmup_steps < FEW_STEPS:
        yield Foreseen("warning", "lr_schedule.warmup_tokens", f"the warm-up is over in {course.warmup_steps} steps")
    decay = schedule.decay_tokens or 0
    if warmup + decay > total:
        message = f"warm-up and decay, {format_count(warmup + decay)} tokens, overlap in a run of {format_count(total)}"
        yield Foreseen("warning", "lr_schedule.decay_tokens", message)
    elif 4 * warmup > total:
        yield Foreseen("warning", "lr_schedule.warmup_tokens", f"the warm-up is {warmup / total:.0%} of the run")
    if plan.epoch_tokens and total > plan.epoch_tokens:
        yield Foreseen("note", "training.total_tokens", f"{total / plan.epoch_tokens:.3g} epochs of the data")


def _intervals(plan: Plan) -> Iterator[Foreseen]:
    steps = plan.course.steps
    interval = plan.recipe.checkpoint.interval_steps
    if interval is None:
        message = f"unset: nothing is saved before the last of {steps} steps"
        yield Foreseen("warning", "checkpoint.interval_steps", message)
    elif interval >= steps:
        message = f"{interval} is not below the {steps} steps of the run: nothing is saved before its end"
        yield Foreseen("warning", "checkpoint.interval_steps", message)
    validation: Any = getattr(plan.recipe, "validation", None)
    if validation is not None and (validation.interval_steps or 0) >= steps:
        message = f"{validation.interval_steps} is not below the {steps} steps of the run: one validation, at its end"
        yield Foreseen("warning", "validation.interval_steps", message)


def _vocabulary(plan: Plan) -> Iterator[Foreseen]:
    rows = getattr(plan.model, "vocab_size", plan.vocab_size)
    if not plan.tokenizer_missing and rows > plan.vocab_size:
        message = f"{rows - plan.vocab_size} of {rows} rows stand for no id of the tokenizer"
        yield Foreseen("note", "model.vocab_size", message)
