"""Set up a run: its processes, its directory, its log, and the checkpoint that it resumes from."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from components.atomic_files import atomic_write
from components.checkpoint import (
    host_memory_directory,
    list_checkpoints,
    remove_all,
    remove_partial_saves,
    run_of,
    step_of,
)
from components.checkpoint.remote import RemoteCheckpoints, restore_run
from components.data.loader_workers import check_workers
from components.distributed.context import DistributedContext
from components.distributed.worker import LAUNCH_ID, change_of_nodes, launch_time
from components.interrupts import SignalCatcher, StopRequests
from components.metrics.console import setup_logging
from components.metrics.jsonl import last_rows
from components.paths import is_file
from components.run_directory import RunDirectory, new_identifier
from recipes.config import Config
from recipes.errors import config_errors_at
from recipes.resume import (
    Resume,
    check_resumable,
    find_checkpoints,
    is_inside,
    log_config_diff,
    newest_intact_checkpoint,
)

log = logging.getLogger("powertrain")


@dataclass
class RunStart:
    """A run directory that this process has claimed, and what to resume from."""

    checkpoint: Path | None
    """The checkpoint to resume from; None for a new run."""
    fetch: Callable[[set[str]], None] | None = None
    """Set if the checkpoint is in the memory of the nodes: copies the files that this rank is going to read to its
    node."""
    run: str = ""
    """The identifier of the run, which owns the directory from `commit` on."""
    warnings: list[str] = field(default_factory=list)
    """Messages to log once logging is set up."""
    restart: dict[str, float] | None = None
    """Metrics of a start after the launcher has restarted the processes: what that cost."""
    commit: Callable[[], None] = lambda: None
    """Call on every rank after setup succeeded: deletes the replaced run and writes run.json and config.toml."""


def claim_run_directory(
    directory: RunDirectory, config: Config, resume: Resume | None, world: DistributedContext, cleanup: ExitStack
) -> RunStart:
    """Lock the directory until `cleanup` and choose a checkpoint. Call on every rank, and then `commit` of the result.

    Raises ConfigError if another run uses the directory, or if it holds a run that is neither resumed nor replaced.
    """
    remote = config.recipe.checkpoint.remote_of(directory.path)
    fetch_from = remote if resume is not None and resume.path is None else None
    with config_errors_at(config, "run"):
        locked = world.main_process_first(partial(_lock, directory, world, cleanup, fetch_from))
        # Processes that the launcher restarted after a failure may continue in the directory that they claimed before.
        restarted = bool(world.all_reduce_max(directory.owned_by(os.environ.get(LAUNCH_ID))))
        find = partial(find_checkpoints, resume, directory.checkpoints, restarted=restarted)
        start = _choose_checkpoint(find, directory, world, remote)
        if restarted and config.recipe.checkpoint.in_memory_interval_steps is not None:
            _prefer_memory(start, world)
        checkpoint = start.checkpoint
        continues = _continues(start, directory)
        replaces = directory.has_run and not continues
        if replaces and config.recipe.run.if_exists == "refuse" and not restarted:
            raise ValueError(
                f"{directory.path} already holds a run; continue it with --resume, give this one another "
                "--run.name, or set --run.if_exists=replace"
            )
        if checkpoint is not None:
            check_resumable(checkpoint, config)
        if restarted and checkpoint is not None and world.is_main:
            start.restart = _cost_of_restart(directory.metrics, checkpoint, world.size)
            start.warnings.append(_describe_restart(start.restart, checkpoint))
        world.on_main_process(partial(_claim, directory, remote, continues=continues, locked=locked))
        # trackers of metrics would take the rows of a new run with the old identifier for those of the old run
        start.run = world.gather(new_identifier() if replaces else directory.run or "")[0]

    start.commit = _make_commit(directory, config, world, start.run, replaces=replaces, remote=remote)
    return start


def _lock(
    directory: RunDirectory, world: DistributedContext, cleanup: ExitStack, remote: RemoteCheckpoints | None
) -> bool:
    """Lock the directory until `cleanup`, fetch its run from `remote` and remove incomplete checkpoints.

    Returns whether this process has the lock: the main process, where the file system supports locks.
    """
    directory.check_links()
    if not world.is_main:
        return False
    locked = cleanup.enter_context(directory.lock())
    if remote is not None:
        restore_run(remote, directory.path, directory.run)
    if locked and (run := directory.run) is not None:
        remove_partial_saves(directory.checkpoints, run)
    return locked


def _claim(directory: RunDirectory, remote: RemoteCheckpoints | None, *, continues: bool, locked: bool) -> None:
    """Claim the directory, and for a new run also the remote one. Raises ValueError if another run has checkpoints in
    one of them."""
    if not continues:
        _refuse_foreign_checkpoints(directory)
        if remote is not None:
            _refuse_foreign_remote(remote, directory)
    directory.claim()
    if remote is not None and not continues:
        remote.directory.upload({directory.owner_file.name: directory.owner_file})  # fails if not writable
    if locked:
        directory.remove_temporary_files()
    directory.stop_file.unlink(missing_ok=True)  # it was meant for an earlier run


def _continues(start: RunStart, directory: RunDirectory) -> bool:
    """Return whether the checkpoint of `start` is one of the run in `directory`."""
    return start.checkpoint is not None and (
        start.fetch is not None
        or start.checkpoint.parent == directory.checkpoints
        or is_inside(start.checkpoint, directory.path)
    )


def _cost_of_restart(metrics: Path, checkpoint: Path, processes: int) -> dict[str, float]:
    """Return the steps after the checkpoint that are trained again, the seconds since the last one was logged, and the
    processes that continue."""
    rows = last_rows(metrics) if is_file(metrics) else []
    last = rows[-1]["step"] if rows else 0
    return {
        "restart_lost_steps": max(0, last - step_of(checkpoint)),
        "restart_seconds": round(max(0.0, time.time() - metrics.stat().st_mtime), 1) if rows else 0.0,
        "restart_processes": processes,
    }


def _describe_restart(cost: dict[str, float], checkpoint: Path) -> str:
    change = change_of_nodes()
    return (
        f"restarted{': ' * bool(change)}{change}; {cost['restart_lost_steps']:.0f} steps since {checkpoint.name} are "
        f"trained again, {cost['restart_seconds']:.0f} s after the last one"
    )


def _make_commit(
    directory: RunDirectory,
    config: Config,
    world: DistributedContext,
    run: str,
    *,
    replaces: bool,
    remote: RemoteCheckpoints | None,
) -> Callable[[], None]:
    """Return the function that removes the replaced run, up to its current log, and writes run.json and config.toml."""
    log_from = directory.log.stat().st_size if replaces and directory.log.exists() else 0
    launch = os.environ.get(LAUNCH_ID)
    launches = world.gather(launch or "")

    def store() -> None:
        if replaces:
            if remote is not None and directory.run is not None:
                remote.remove_all(directory.run)
            remove_old_run(directory, log_from)
        if replaces or launch is not None:
            directory.record_owner(run, filter(None, launches))
        atomic_write(directory.config, config.to_toml())

    def commit() -> None:
        with config_errors_at(config, "run"):
            world.on_main_process(store)

    return commit


def remove_old_run(directory: RunDirectory, log_from: int | None = None) -> None:
    """Remove the checkpoints of the run that owns the directory, and what `RunDirectory.clear` removes."""
    if (run := directory.run) is not None:
        remove_all(directory.checkpoints, run)
        directory.clear(log_from)


def _refuse_foreign_checkpoints(directory: RunDirectory) -> None:
    """Raise ValueError for a checkpoint of another run, which the new run would keep and mistake for its newest."""
    run = directory.run
    foreign = [path for path in list_checkpoints(directory.checkpoints) if run is None or run_of(path) != run]
    if foreign:
        raise ValueError(
            f"{foreign[-1]} was not written by the run that owns this directory, and a new run would mistake it for "
            "its newest checkpoint; move it away, give this run another --run.name, or continue it with --resume"
        )


def _refuse_foreign_remote(remote: RemoteCheckpoints, directory: RunDirectory) -> None:
    """Raise ValueError if another run has checkpoints at the address, which this one would mix with its own."""
    run = remote.newest_run()
    if run is not None and run != directory.run:
        raise ValueError(
            f"{remote.directory} holds checkpoints of another run; continue it with --resume, give this run another "
            "--run.name, or remove them"
        )


def _choose_checkpoint(
    find: Callable[[], list[Path]],
    directory: RunDirectory,
    world: DistributedContext,
    remote: RemoteCheckpoints | None,
) -> RunStart:
    """Return the newest of the checkpoints that `find` returns that is intact. Before an older one is used in place of
    a damaged one of this run, a copy of the damaged one is looked for at `remote`.
    """
    candidates, damages, own = find(), list[str](), directory.checkpoints
    checkpoint = newest_intact_checkpoint(candidates, world, damages, own)
    if damages and remote is not None and candidates[-1].parent == own:
        damaged = candidates[-len(damages) :]
        world.on_main_process(lambda: restore_run(remote, directory.path, directory.run, damaged=damaged))
        candidates = find()
        checkpoint = newest_intact_checkpoint(candidates, world, [], own)
    if not candidates:
        return RunStart(None)
    if checkpoint is None:
        others = len(candidates) - 1
        raise ValueError(f"--resume: {damages[0]}" + (f"; the {others} before it are damaged, too" if others else ""))

    return RunStart(checkpoint, warnings=[f"{damage}; using {checkpoint}" for damage in damages])


def _prefer_memory(start: RunStart, world: DistributedContext) -> None:
    """Replace the checkpoint of `start` by one in the memory of the nodes, if there is a newer one."""
    from components.checkpoint.in_memory import InMemoryCheckpoint

    newest = -1 if start.checkpoint is None else step_of(start.checkpoint)
    found = InMemoryCheckpoint.find(host_memory_directory(), world, newer_than=newest)
    if found is not None:
        start.checkpoint, start.fetch = found.path, found.fetch


@dataclass(frozen=True)
class Environment:
    """The processes, the directory and the log of a run."""

    world: DistributedContext
    directory: RunDirectory
    start: RunStart
    console: Console
    requests: StopRequests


def build_environment(config: Config, resume: Resume | None, cleanup: ExitStack) -> Environment:
    """Join the processes, lock the run directory and start the log."""
    recipe = config.recipe
    signals = cleanup.enter_context(SignalCatcher())
    with config_errors_at(config, "run.device"):
        world = DistributedContext.init(recipe.run.device)
    cleanup.push(world.close_unless_failed)
    with config_errors_at(config, "training.num_workers"):
        check_workers(recipe.training.num_workers)
    directory = RunDirectory(recipe.run.directory)
    start = claim_run_directory(directory, config, resume, world, cleanup)
    with config_errors_at(config, "run"):
        console = setup_logging(directory.log if world.is_main else None, to_console=world.is_main)
    for warning in start.warnings:
        log.warning(warning)
    if start.checkpoint is not None:
        log_config_diff(start.checkpoint, config)
    limit = recipe.run.max_minutes
    requests = StopRequests(
        signals,
        file=directory.stop_file if world.is_main else None,
        ends_at=None if limit is None else launch_time() + 60 * limit,
    )
    torch.manual_seed(recipe.run.seed + world.rank)
    torch.use_deterministic_algorithms(recipe.run.deterministic)
    return Environment(world, directory, start, console, requests)
