"""The printed report of `--dry-run`: all of its tables, and the problems of the run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from components.hardware import DeviceSpec, device_spec
from components.units import format_count
from recipes.config import Config, ConfigError
from recipes.config.errors import Problem
from recipes.dry_run.memory import PLANNED_FRACTION, Memory
from recipes.dry_run.plan import HardwareTarget, RunPlan, make_plan
from recipes.dry_run.preflight import preflight_checks
from recipes.dry_run.schedule_preview import SchedulePreview
from recipes.dry_run.step_time import estimate_step_time, update_collectives
from recipes.interfaces import complete_model

DEFAULT_DEVICES = ("A100", "H100", "H200", "B200")
"""Devices whose memory and time are shown if none is named."""


def print_report(config: Config, world_size: int, target: HardwareTarget, local_size: int | None = None) -> int:
    """Print plan and problems of `world_size` processes, `local_size` on each node (by default all on one).

    Returns the exit status: 2 if the run is impossible.
    """
    try:
        plan = make_plan(config, world_size, target, local_size)
    except ConfigError as error:
        print("\n".join(["problems", *(_format_problem("error", problem) for problem in error.problems)]))
        return 2
    findings = list(preflight_checks(plan))
    problems = [_format_problem(each.level, config.problem(each.key, each.message)) for each in findings]
    print("\n".join([*report_lines(plan), "", "problems", *(problems or ["  none found"])]))
    return 2 if any(each.level == "error" for each in findings) else 0


def report_lines(plan: RunPlan) -> Iterator[str]:
    """Yield the lines of the report, without its problems."""
    yield from _run(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _schedule(plan.schedule, plan.recipe.training.sequence_length)
    yield ""
    device = plan.target.device
    devices = [device_spec(name) for name in DEFAULT_DEVICES] if device is None else [device]
    yield from _devices(plan, devices)
    yield from _step(plan, devices)


def _run(plan: RunPlan) -> Iterator[str]:
    recipe, schedule, rounding = plan.recipe, plan.schedule, plan.batch_rounding
    length = recipe.training.sequence_length
    numels = [(parameter.numel(), parameter.ndim) for parameter in plan.model.parameters()]
    parameters, matrices = sum(n for n, _ in numels), sum(n for n, ndim in numels if ndim > 1)
    yield f"run            {recipe.run.directory}"
    yield f"model          {parameters:,} parameters, {matrices:,} of them in matrices; vocabulary {plan.vocab_size:,}"
    experts = sum(n for n, ndim in numels if ndim == 3)
    if experts and (active := complete_model(plan.model).active_parameters()) is not None:
        yield f"experts        {experts:,} of the parameters; one token uses {active:,} in the layers"
    world_size = plan.mesh_shape.world_size
    yield f"processes      {world_size} = {plan.mesh_shape}"
    yield f"batch          multiples of {rounding}"
    yield (
        f"length         {format_count(schedule.tokens)} tokens = {schedule.samples:,} samples of {length:,}, "
        f"in {schedule.num_steps:,} steps; mean batch {schedule.mean_batch:,.0f}"
    )
    if plan.epoch_tokens:
        epochs = schedule.tokens / plan.epoch_tokens
        yield f"data           about {format_count(plan.epoch_tokens)} tokens: {epochs:.3g} epochs"
    yield f"FLOPs          {plan.flops_per_token:.4g} per token, {plan.flops:.4g} in total"
    if plan.update_cost is not None:
        size = _format_bytes(sum(round(each.size) for each in update_collectives(plan) if each.ranks > 1))
        yield f"update         {plan.update_cost.flops:.4g} FLOPs per step over all processes; each receives {size}"
    if isinstance(plan.memory, Memory):
        kept = recipe.checkpoint.keep_last
        how_many = "all kept" if kept is None else f"the last {kept} kept"
        yield f"checkpoint     {_format_bytes(plan.memory.state_bytes)}, {how_many}"


def _memory(plan: RunPlan) -> Iterator[str]:
    memory = plan.memory
    if isinstance(memory, str):
        yield f"memory         {memory}"
        return
    yield f"memory of a rank, products in {'bf16' if plan.dtype == torch.bfloat16 else 'float32'}"
    for part, (size, why) in memory.parts.items():
        yield f"  {part:<17}{_format_bytes(size):>10}  {why}"
    yield f"  {'at most':<17}{_format_bytes(memory.peak):>10}  at one moment, roughly"
    if memory.local_peak > memory.peak:
        where = {
            "auto": f"on a device of {_format_bytes(int(memory.local_peak / PLANNED_FRACTION))} or more",
            "once_per_step": "as here",
            "every_micro_batch": "not here",
        }[plan.recipe.training.grad_sync]
        yield f'  {"or at most":<17}{_format_bytes(memory.local_peak):>10}  with grad_sync = "once_per_step", {where}'


def _schedule(schedule: SchedulePreview, sequence_length: int) -> Iterator[str]:
    yield f"{'step':>10} {'after tokens':>16} {'batch':>7} {'batch tokens':>12} {'micro':>6} {'lr':>10}"
    for reasons, step in schedule.milestones:
        yield (
            f"{step.number:>10,} {step.tokens:>16,} {step.batch:>7,} "
            f"{format_count(step.batch * sequence_length):>12} {step.micro_batches:>6,} {step.lr:>10.3g}  "
            + ", ".join(reasons)
        )


def _devices(plan: RunPlan, devices: list[DeviceSpec]) -> Iterator[str]:
    world_size = plan.mesh_shape.world_size
    yield f"at {plan.target.mfu:.0%} MFU on {world_size}  {'time':>9} {'device-hours':>13}  memory of a rank"
    for device in devices:
        seconds = plan.seconds_on(device)
        hours = f"{seconds * world_size / 3600:,.1f}"
        yield f"  {device.name:<16} {_format_duration(seconds):>9} {hours:>13}  {_memory_fit(plan, device)}"


def _step(plan: RunPlan, devices: list[DeviceSpec]) -> Iterator[str]:
    """Yield what bounds a step of the mean batch."""
    micro_batches = plan.batch_rounding.round_up(round(plan.schedule.mean_batch)).micro_batches
    steps = [(device, step) for device in devices if (step := estimate_step_time(plan, device, micro_batches))]
    if steps:
        columns = " ".join(f"{column:>10}" for column in ("compute", "NVLink", "InfiniBand", "launching"))
        yield ""
        yield f"{f'a step of {micro_batches} micro-batches':<28} {columns}  bound by"
    for device, step in steps:
        seconds = (step.compute, step.nvlink, step.infiniband, step.launch)
        times = " ".join(f"{f'{1e3 * part:,.0f} ms' if part else '-':>10}" for part in seconds)
        yield f"  {device.name:<26} {times}  {step.bound}"


def _memory_fit(plan: RunPlan, device: DeviceSpec) -> str:
    if isinstance(plan.memory, str):
        return "unknown"
    needed = plan.peak_on(plan.memory, device)
    local = plan.memory.local_peak > plan.memory.peak and plan.syncs_once_per_step(plan.memory, device)
    verdict = "fits" if needed <= device.memory_bytes else "does not fit"
    how = ', grad_sync = "once_per_step"' if local else ""
    return f"{needed / 1e9:,.1f} of {device.memory_bytes / 1e9:,.0f} GB: {verdict}{how}"


def _format_problem(level: str, problem: Problem) -> str:
    first, *rest = str(problem).splitlines()
    return "\n".join([f"  {level:<8} {first}", *(f"  {'':<8} {line}" for line in rest)])


def _format_bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _format_duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
