"""Making the run directory ready: whose it is, what dead runs left in it, and which checkpoint is continued."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from components.atomic_files import atomic_write
from components.checkpoint import DamagedError, list_checkpoints, remove_all, remove_partial_saves, run_of, verify
from components.distributed.context import DistributedContext
from components.distributed.launcher import LAUNCH_ID
from components.run_directory import RunDirectory
from recipes.config import Config
from recipes.errors import config_errors_at
from recipes.resume import Resume, check_resumable, find_checkpoints, is_inside


@dataclass
class RunStart:
    """A run directory that is ready."""

    checkpoint: Path | None
    """The one to continue."""
    run: str = ""
    """Identifier of the run whose directory this is."""
    warnings: list[str] = field(default_factory=list)
    """What there is to tell, once there is a log to tell it in."""
    begin: Callable[[], None] = lambda: None
    """Every rank calls it when all is ready: only then what an old run left is removed, and the new one is stored."""


def claim_run_directory(
    directory: RunDirectory, config: Config, resume: Resume | None, world: DistributedContext, cleanup: ExitStack
) -> RunStart:
    """Take the directory until `cleanup`. Every rank calls it, and `begin` of what it returns.

    Raises ConfigError where the run may not begin: another one is in it, or it holds one that is not to be continued.
    """
    launch, locked = os.environ.get(LAUNCH_ID), False

    def take() -> None:
        nonlocal locked
        directory.check_links()
        locked = world.is_main and cleanup.enter_context(directory.held())
        if locked and (run := directory.run) is not None:
            remove_partial_saves(directory.checkpoints, run)

    def claim() -> None:
        if world.is_main:
            if not continues:
                _refuse_foreign_checkpoints(directory)
            directory.claim()
            if locked:
                directory.sweep()
            directory.stop.unlink(missing_ok=True)  # it was meant for a run before

    with config_errors_at(config, "run"):
        world.main_process_first(take)
        # Processes that were started again after a failure find the directory as they left it, and may use it.
        restarted = bool(world.all_reduce_max(directory.belongs_to(launch)))
        opened = _choose(find_checkpoints(resume, directory.checkpoints, restarted=restarted), directory, world)
        checkpoint = opened.checkpoint
        continues = checkpoint is not None and (
            checkpoint.parent == directory.checkpoints or is_inside(checkpoint, directory.path)
        )
        replaces = directory.used and not continues
        if replaces and config.recipe.run.if_exists == "refuse" and not restarted:
            raise ValueError(
                f"{directory.path} already holds a run; continue it with --resume, give this one another "
                "--run.name, or say --run.if_exists=replace"
            )
        if checkpoint is not None:
            check_resumable(checkpoint, config)
        world.main_process_first(claim)
        opened.run = world.gather(directory.run or "")[0]

    opened.begin = _begin(directory, config, world, replaces=replaces)
    return opened


def _begin(directory: RunDirectory, config: Config, world: DistributedContext, *, replaces: bool) -> Callable[[], None]:
    """Return the function that removes the run that is replaced, as it is now, and stores the configuration."""
    log_from = directory.log.stat().st_size if replaces and directory.log.exists() else 0
    launch = os.environ.get(LAUNCH_ID)
    launches = world.gather(launch or "")

    def store() -> None:
        if world.is_main:
            if replaces:
                remove_old_run(directory, log_from)
            atomic_write(directory.config, config.to_toml())
            if launch is not None:
                directory.remember(launches)

    def begin() -> None:
        with config_errors_at(config, "run"):
            world.main_process_first(store)

    return begin


def remove_old_run(directory: RunDirectory, log_from: int | None = None) -> None:
    """Remove what the run whose directory this is has written; as `RunDirectory.clear`, and its checkpoints."""
    if (run := directory.run) is not None:
        remove_all(directory.checkpoints, run)
        directory.clear(log_from)


def _refuse_foreign_checkpoints(directory: RunDirectory) -> None:
    """Raises ValueError for a checkpoint that a new run would not remove, and then take for its own newest."""
    run = directory.run
    foreign = [path for path in list_checkpoints(directory.checkpoints) if run is None or run_of(path) != run]
    if foreign:
        raise ValueError(
            f"{foreign[-1]} was not written by the run of this directory, and a new run would take it for its own; "
            "move it away, give this run another --run.name, or continue it with --resume"
        )


def newest_intact_checkpoint(candidates: list[Path], world: DistributedContext, damages: list[str]) -> Path | None:
    """The last of `candidates` whose content is what was saved; of each that is not, `damages` gets a line.

    All ranks read their share of it, and find the same. Raises ValueError where they have others to choose from.
    """
    names = [checkpoint.name for checkpoint in candidates]
    if not world.all_equal(str(names)):
        raise ValueError(
            f"the processes do not see the same checkpoints; this one sees {', '.join(names) or 'none'}. All need the "
            "run directory, on a file system that shows what another node has written; try again"
        )
    for checkpoint in reversed(candidates):
        damage = ""
        try:
            verify(checkpoint, rank=world.rank, ranks=world.size)
        except DamagedError as error:
            damage = str(error)
        found = [text for text in world.gather(damage) if text]
        if not found:
            return checkpoint
        damages.append(found[0])
    return None


def _choose(candidates: list[Path], directory: RunDirectory, world: DistributedContext) -> RunStart:
    damages: list[str] = []
    checkpoint = newest_intact_checkpoint(candidates, world, damages)
    if not candidates:
        return RunStart(None)
    if checkpoint is None:
        others = len(candidates) - 1
        raise ValueError(f"--resume: {damages[0]}" + (f"; so are the {others} before it" if others else ""))

    def set_aside() -> None:
        """Under its name a damaged one would be the newest, for which sound ones are removed in their turn."""
        if world.is_main and checkpoint.parent == directory.checkpoints:
            for damaged in candidates[candidates.index(checkpoint) + 1 :]:
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))

    world.main_process_first(set_aside)
    return RunStart(checkpoint, warnings=[f"{damage}; taking the checkpoint before it" for damage in damages])
