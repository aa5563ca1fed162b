"""Commit of a checkpoint: write its files to a temporary directory, fsync, rename it; also the removal of leftovers.

A checkpoint is complete or does not exist, whenever the process is killed. `atomic_directory` of atomic_files.py does
the same for a directory that one process writes; here all ranks write, and a complete checkpoint may be replaced.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from components.atomic_files import fsync_directory, remove_files, write_fsync
from components.checkpoint.load import FORMAT, root_cause
from components.checkpoint.manifest import WRITTEN, run_of, write_manifest, write_part
from components.distributed.collectives import all_gather_object, run_on_all_ranks
from components.interfaces import WorldComm

if TYPE_CHECKING:
    from components.checkpoint.async_saver import AsyncSaver
    from components.checkpoint.tensor_writer import SavePlans

T = TypeVar("T")

log = logging.getLogger("powertrain")

# {} is the identifier of the run, so that a run never removes the directories of another.
TMP_PREFIX = ".writing-{}-"
_REPLACED = ".replaced-{}-"
_REMOVED = "removed-"
_SAVED = re.compile(r"step-\d{8,}|damaged-step-\d{8,}(-[0-9a-f]{6})?")


class CheckpointWriter:
    """Writes the checkpoints of a run. Every rank constructs one and calls it at the same time."""

    def __init__(self, world: WorldComm, *, run: str, saver: AsyncSaver | None) -> None:
        """`run` identifies the run; with `saver`, its thread calls `write`, on tensors that are copied already."""
        self.world = world
        self.run = run
        self.in_background = saver is not None
        self.group = None if saver is None else saver.group
        self._plans: SavePlans | None = None

    def write(
        self,
        final: Path,
        tensors: dict[str, Any],
        state: Mapping[str, Any],
        config: str,
        *,
        after_commit: Callable[[], None] = lambda: None,
    ) -> bool:
        """Write `final`; return whether that succeeded, equal on every rank. A failure is logged.

        `after_commit` is called on the main rank once `final` is complete.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        from components.checkpoint.tensor_writer import SavePlans, TensorWriter

        plans = self._plans = self._plans or SavePlans()
        temporary = final.with_name(f"{TMP_PREFIX.format(self.run)}{final.name}")
        writer = TensorWriter(temporary)
        if self.in_background:
            # The copy is in main memory already; in this thread, the copy stream of torch would be one of GPU 0.
            writer.per_thread_copy_ahead = 0

        def prepare() -> None:
            if self.makes_directory:
                _remove_partial(temporary)
                temporary.mkdir(parents=True)

        def write() -> None:
            try:
                dcp.save(
                    tensors,
                    storage_writer=writer,
                    planner=plans.planner(),
                    process_group=self.group,
                    no_dist=self.world.size == 1,
                )
            except CheckpointException as error:
                if error.failures and self.world.rank not in error.failures:
                    return  # a rank that failed raises its error on all, which names it
                raise OSError(str(root_cause(error))) from error

        def finish() -> None:
            self.finish_files(temporary, state, config)

        def commit() -> None:
            if self.makes_directory:
                self.commit(temporary, final, state, config)
                after_commit()

        try:
            # every stage ends on all ranks before the next one starts, so an error on one rank fails the save on all
            for stage in (prepare, write, finish, commit):
                run_on_all_ranks(stage, self.gather)
        except Exception as error:
            log.error(f"{final} could not be saved: {error}. Earlier checkpoints are intact")
            plans.clear()
            if self.makes_directory:
                with suppress(OSError):
                    _remove_partial(temporary)  # it would take the space that the next save needs
            return False
        if self.in_background:
            log.info(f"saved {final}")
        return True

    def close(self) -> None:
        """Drop the cached plans of torch."""
        if self._plans is not None:
            self._plans.clear()

    @property
    def makes_directory(self) -> bool:
        """Whether this rank makes the directory of a checkpoint and completes it."""
        return self.world.is_main

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, in order of rank, in the process group that this writer uses."""
        return [value] if self.world.size == 1 else all_gather_object(value, self.group)

    def finish_files(self, temporary: Path, state: Mapping[str, Any], config: str) -> None:
        """Called on every rank when all have written their tensors to `temporary`."""
        write_part(temporary, self.world.rank)

    def commit(self, temporary: Path, final: Path, state: Mapping[str, Any], config: str) -> None:
        """Complete `temporary`, which holds the files of all ranks, and rename it to `final`."""
        write_fsync(temporary / "state.json", format_state(state))
        write_fsync(temporary / "config.toml", config)
        write_manifest(temporary, self.world.size, self.run)
        fsync_directory(temporary)
        replaced = final.with_name(f"{_REPLACED.format(self.run)}{final.name}")
        if os.path.lexists(final):
            if run_of(final) != self.run:
                raise OSError("a checkpoint of this name exists that this run did not write")
            # if this process is killed before the next rename, `remove_partial_saves` restores it
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        fsync_directory(final.parent)
        with suppress(OSError):
            _remove_partial(replaced)


def format_state(state: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **state}, indent=1)


def remove(checkpoint: Path, run: str) -> None:
    """Delete a checkpoint of `run`. It is renamed first, so that an interruption never leaves half a checkpoint.

    Of a link, only the link is removed. Files that no save writes are kept, in a directory `not-removed-...`.
    """
    leaving = checkpoint.with_name(f"{TMP_PREFIX.format(run)}{_REMOVED}{checkpoint.name}")
    checkpoint.rename(leaving)
    _remove_partial(leaving)


def mark_damaged(damaged: Path) -> None:
    """Rename a damaged checkpoint, so that it is not listed: as the newest, it would make `keep_last` remove others."""
    target = damaged.with_name(f"damaged-{damaged.name}")
    if os.path.lexists(target):  # an earlier save of this step was damaged too
        target = target.with_name(f"{target.name}-{uuid.uuid4().hex[:6]}")
    damaged.rename(target)


def remove_all(directory: Path, run: str) -> None:
    """Delete every checkpoint that `run` wrote to `directory`, also damaged ones, and the directory if it is empty.

    A directory that is a link is not deleted. Raises OSError for files that cannot be removed.
    """
    if not directory.is_dir():
        return
    remove_partial_saves(directory, run)
    for checkpoint in list(directory.iterdir()):
        if _SAVED.fullmatch(checkpoint.name) and run_of(checkpoint) == run:
            remove(checkpoint, run)
    if not directory.is_symlink() and not any(directory.iterdir()):
        directory.rmdir()


def remove_partial_saves(directory: Path, run: str) -> None:
    """Remove the leftovers of interrupted saves of `run` in `directory`. No save of `run` may be in progress."""
    if not directory.is_dir():
        return
    replaced, partial = _REPLACED.format(run), TMP_PREFIX.format(run)
    leftovers = sorted(directory.iterdir())
    for leftover in leftovers:
        if leftover.name.startswith(replaced):
            final = directory / leftover.name.removeprefix(replaced)
            if os.path.lexists(final):
                _remove_partial(leftover)
            else:  # killed between the two renames: restore the checkpoint that was to be replaced
                leftover.rename(final)
        elif leftover.name.startswith(partial):
            _remove_partial(leftover)


def _remove_partial(leftover: Path) -> None:
    """Remove the files of a save in `leftover`. Other files are kept, in a directory that is not hidden."""
    if os.path.lexists(leftover) and not remove_files(leftover, WRITTEN.fullmatch):
        step = leftover.name.rpartition("step-")[2]
        leftover.rename(leftover.with_name(f"not-removed-step-{step}-{uuid.uuid4().hex[:6]}"))
