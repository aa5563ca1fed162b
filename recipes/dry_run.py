"""`--dry-run`: print what a run would be, and what would go wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from components.throughput import Device, named_device
from components.units import format_count
from recipes.config import Config, ConfigError
from recipes.config.errors import Problem
from recipes.foresee import foresee
from recipes.memory_estimate import PLANNED, Memory
from recipes.plan import Claim, Plan, make_plan
from recipes.step_estimate import estimate_step

SHOWN_DEVICES = ("A100", "H100", "H200", "B200")
"""Whose memory and time are shown where no device is named."""


def main(config: Config, world_size: int, claim: Claim, local_size: int | None = None) -> int:
    """Print plan and problems of `world_size` processes, `local_size` on each node; without it they are all on one.

    Returns the exit status: 2 when the run is impossible.
    """
    try:
        plan = make_plan(config, world_size, claim, local_size)
    except ConfigError as error:
        print("\n".join(["problems", *(_labelled("error", problem) for problem in error.problems)]))
        return 2
    found = [(item.level, _labelled(item.level, config.problem(item.key, item.message))) for item in foresee(plan)]
    print("\n".join([*report(plan), "", "problems", *([text for _, text in found] or ["  none foreseen"])]))
    return 2 if any(level == "error" for level, _ in found) else 0


def report(plan: Plan) -> Iterator[str]:
    """The plan in lines."""
    yield from _run(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from plan.course.lines(plan.recipe.training.sequence_length)
    yield ""
    yield from _devices(plan)
    yield from _step(plan)


def _run(plan: Plan) -> Iterator[str]:
    recipe, course, layout = plan.recipe, plan.course, plan.layout
    length = recipe.training.sequence_length
    parameters = sum(parameter.numel() for parameter in plan.model.parameters())
    matrices = sum(parameter.numel() for parameter in plan.model.parameters() if parameter.ndim > 1)
    replicas, shards, tp = plan.sizes
    unit = f"{layout.unit} = {layout.dp_size} ranks x {layout.micro_batch_size} a micro-batch"
    yield f"run            {recipe.run.directory}"
    yield f"model          {parameters:,} parameters, {matrices:,} of them in matrices; vocabulary {plan.vocab_size:,}"
    experts = sum(parameter.numel() for parameter in plan.model.parameters() if parameter.ndim == 3)
    active: Callable[[], int] | None = getattr(plan.model, "active_parameters", None)
    if experts and active is not None:
        yield f"experts        {experts:,} of the parameters; one token meets {active():,} in the layers"
    yield f"processes      {plan.world_size} = {replicas} (dp_replicate) x {shards} (dp_shard) x {tp} (tp)"
    yield f"batch          multiples of {unit}"
    yield (
        f"length         {format_count(course.tokens)} tokens = {course.samples:,} samples of {length:,}, "
        f"in {course.steps:,} steps; mean batch {course.mean_batch:,.0f}"
    )
    if plan.epoch_tokens:
        epochs = course.tokens / plan.epoch_tokens
        yield f"data           about {format_count(plan.epoch_tokens)} tokens: {epochs:.3g} epochs"
    yield f"FLOPs          {plan.flops_per_token:.4g} a token, {plan.flops:.4g} in all"
    if isinstance(plan.memory, Memory):
        kept = recipe.checkpoint.keep_last
        how_many = "all kept" if kept is None else f"the last {kept} kept"
        yield f"checkpoint     {_size(plan.memory.state_bytes)}, {how_many}"


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    if isinstance(memory, str):
        yield f"memory         {memory}"
        return
    name = "bf16" if plan.dtype == torch.bfloat16 else "float32"
    yield f"memory of a rank, products in {name}"
    for what, (size, why) in memory.parts.items():
        yield f"  {what:<17}{_size(size):>10}  {why}"
    yield f"  {'at most':<17}{_size(memory.peak):>10}  at one moment, roughly"
    if memory.local_peak > memory.peak:
        where = {
            "auto": f"as on a device of {_size(int(memory.local_peak / PLANNED))} or more",
            "local": "as here",
            "reduce": "not here",
        }[plan.recipe.training.accumulation]
        yield f'  {"or at most":<17}{_size(memory.local_peak):>10}  with accumulation = "local", {where}'


def _devices(plan: Plan) -> Iterator[str]:
    devices = _shown(plan)
    yield f"at {plan.claim.mfu:.0%} MFU on {plan.world_size}  {'time':>9} {'device-hours':>13}  memory of a rank"
    for each in devices:
        seconds = plan.seconds_on(each)
        hours = f"{seconds * plan.world_size / 3600:,.1f}"
        yield f"  {each.name:<16} {_duration(seconds):>9} {hours:>13}  {_fit(plan, each)}"


def _shown(plan: Plan) -> list[Device]:
    device = plan.claim.device
    return [named_device(name) for name in SHOWN_DEVICES] if device is None else [device]


def _step(plan: Plan) -> Iterator[str]:
    """What bounds a step of the mean batch."""
    micro_batches = plan.layout.fit(round(plan.course.mean_batch)).micro_batches
    steps = [(each, estimate_step(plan, each, micro_batches)) for each in _shown(plan)]
    columns = ("compute", "NVLink", "InfiniBand", "launching")
    if any(step is not None for _, step in steps):
        yield ""
        title = f"a step of {micro_batches} micro-batches"
        yield " ".join([f"{title:<28}", *(f"{column:>10}" for column in columns), " bound by"])
    for each, step in steps:
        if step is not None:
            seconds = (step.compute, step.nvlink, step.infiniband, step.launch)
            times = (f"{1e3 * part:,.0f} ms" if part else "-" for part in seconds)
            yield " ".join([f"  {each.name:<26}", *(f"{time:>10}" for time in times), f" {step.bound}"])


def _fit(plan: Plan, device: Device) -> str:
    if isinstance(plan.memory, str):
        return "unknown"
    needed = plan.peak_on(plan.memory, device)
    locally = plan.memory.local_peak > plan.memory.peak and plan.accumulates_locally(plan.memory, device)
    verdict = "fits" if needed <= device.memory_bytes else "does not fit"
    how = ', accumulation = "local"' if locally else ""
    return f"{needed / 1e9:,.1f} of {device.memory_bytes / 1e9:,.0f} GB: {verdict}{how}"


def _labelled(level: str, problem: Problem) -> str:
    first, *rest = str(problem).splitlines()
    return "\n".join([f"  {level:<8} {first}", *(f"  {'':<8} {line}" for line in rest)])


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
