"""CheckpointManager: saves checkpoints, lists them and deletes old ones."""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.atomic_files import fsync_directory, remove_files, write_fsync
from components.checkpoint.load import (
    FORMAT,
    list_checkpoints,
    root_cause,
    silence_no_dist_warning,
    step_of,
)
from components.checkpoint.manifest import WRITTEN, run_of, write_manifest, write_part
from components.distributed.collectives import run_on_all_ranks
from components.interfaces import WorldComm
from components.units import PositiveCount

if TYPE_CHECKING:
    from components.checkpoint.async_saver import AsyncSaver
    from components.checkpoint.tensor_writer import SavePlans

log = logging.getLogger("powertrain")

# {} is the identifier of the run, so that a run never removes the directories of another.
_TMP_PREFIX = ".writing-{}-"
_REPLACED = ".replaced-{}-"
_REMOVED = "removed-"
_SAVED = re.compile(r"(damaged-)?step-\d{8,}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """[checkpoint]: when to save, and which checkpoints to keep. A run also saves when it ends or is stopped."""

    interval_steps: PositiveCount | None = 1000
    """Optimizer steps between saves; "none": only at the end."""
    keep_last: PositiveCount | None = 3
    """How many of the latest checkpoints to keep; "none": all."""
    keep_every: PositiveCount | None = None
    """Checkpoints whose step is a multiple of this are never deleted."""
    async_save: bool = False
    """Write in the background: training waits only until the state is copied, which takes as much memory again."""

    def build(self, directory: Path, world: WorldComm, *, run: str = "") -> CheckpointManager:
        return CheckpointManager(
            directory, world, run=run, keep_last=self.keep_last, keep_every=self.keep_every, async_save=self.async_save
        )


class CheckpointManager:
    """Saves checkpoints to a directory, lists them and deletes old ones. Every rank constructs one at the same time.

    A save that fails, because the disk is full or gone, is logged and its files are removed. Earlier checkpoints stay,
    and training can continue.
    """

    def __init__(
        self,
        directory: Path,
        world: WorldComm,
        *,
        run: str = "",
        keep_last: int | None = None,
        keep_every: int | None = None,
        async_save: bool = False,
    ) -> None:
        """`run` identifies the run in its checkpoints; the manager deletes only those with this identifier."""
        self.directory = directory
        self.world = world
        self.run = run
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.saved_step: int | None = None
        """Step of the last save that is known to be complete, equal on all ranks; `wait` updates it."""
        self.failed_steps: list[int] = []
        """Steps whose save failed; `wait` updates them."""
        self._saver: AsyncSaver | None = None
        self._plans: SavePlans | None = None
        self._saving = 0
        if async_save:
            from components.checkpoint.async_saver import AsyncSaver

            self._saver = AsyncSaver(world.long_timeout_group)

    def list_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return list_checkpoints(self.directory)

    def latest(self) -> Path | None:
        """Return the complete checkpoint of the largest step, or None, after waiting for a running save."""
        self.wait()
        return max(self.list_checkpoints(), default=None, key=step_of)

    def save(self, step: int, tensors: dict[str, Any], state: Mapping[str, Any], config: str) -> bool | None:
        """Write the checkpoint of `step` and delete those that are no longer to be kept. Every rank must call it.

        `tensors` is a nested dict of tensors and DTensors; `state` must be serializable as JSON. A checkpoint of the
        same step is replaced. A running save is waited for first.

        Returns whether the checkpoint was saved. An asynchronous save returns None as soon as `tensors` are copied;
        `wait` then updates `saved_step` or `failed_steps`.
        """
        self.wait()
        self._saving = step
        final = self.path(step)
        saver = self._saver
        gather = self.world.gather if saver is None else saver.gather

        def write(tensors: dict[str, Any]) -> bool:
            return self._write(final, tensors, state, config, gather)

        if saver is not None:
            saver.start(tensors, write)
            return None
        with silence_no_dist_warning():
            self._record(write(tensors))
        return self.saved_step == step

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint of `step`."""
        return self.directory / f"step-{step:08d}"

    def wait(self) -> None:
        """Wait for a running asynchronous save."""
        if self._saver is not None and (saved := self._saver.wait()) is not None:
            self._record(saved)

    def close(self) -> None:
        """Wait for a running save and end the thread."""
        self.wait()
        if self._saver is not None:
            self._saver.close()
        if self._plans is not None:
            self._plans.clear()

    def _record(self, saved: bool) -> None:
        if saved:
            self.saved_step = self._saving
        else:
            self.failed_steps.append(self._saving)

    def _write(
        self,
        final: Path,
        tensors: dict[str, Any],
        state: Mapping[str, Any],
        config: str,
        gather: Callable[[str], list[str]],
    ) -> bool:
        """Write `final`; return whether that succeeded, equal on every rank. A failure is logged."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        from components.checkpoint.tensor_writer import SavePlans, TensorWriter

        plans = self._plans = self._plans or SavePlans()
        temporary = self.directory / f"{_TMP_PREFIX.format(self.run)}{final.name}"
        writer = TensorWriter(temporary)
        if self._saver is not None:
            # The copy is in main memory already; in this thread, the copy stream of torch would be one of GPU 0.
            writer.per_thread_copy_ahead = 0
        group = self._saver.group if self._saver is not None else None

        def prepare() -> None:
            if self.world.is_main:
                _remove_partial(temporary)
                temporary.mkdir(parents=True)

        def write() -> None:
            try:
                dcp.save(
                    tensors,
                    storage_writer=writer,
                    planner=plans.planner(),
                    process_group=group,
                    no_dist=self.world.size == 1,
                )
            except CheckpointException as error:
                raise OSError(str(root_cause(error))) from error
            write_part(temporary, self.world.rank)

        def commit() -> None:
            if self.world.is_main:
                self._commit(temporary, final, state, config)

        try:
            # every stage ends on all ranks before the next one starts, so an error on one rank fails the save on all
            for stage in (prepare, write, commit):
                run_on_all_ranks(stage, gather)
        except Exception as error:
            log.error(f"{final} could not be saved: {error}. Earlier checkpoints are intact")
            plans.clear()
            if self.world.is_main:
                with suppress(OSError):
                    _remove_partial(temporary)  # it would take the space that the next save needs
            return False
        if self._saver is not None:
            log.info(f"saved {final}")
        return True

    def _commit(self, temporary: Path, final: Path, state: Mapping[str, Any], config: str) -> None:
        """Complete `temporary`, which holds the files of all ranks, rename it to `final` and delete old checkpoints."""
        write_fsync(temporary / "state.json", json.dumps({"format": FORMAT, **state}, indent=1))
        write_fsync(temporary / "config.toml", config)
        write_manifest(temporary, self.world.size, self.run)
        fsync_directory(temporary)
        replaced = self.directory / f"{_REPLACED.format(self.run)}{final.name}"
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
        fsync_directory(self.directory)
        with suppress(OSError):
            _remove_partial(replaced)
        self._prune()

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        for old in self.list_checkpoints()[: -self.keep_last]:
            if (self.keep_every is None or step_of(old) % self.keep_every) and run_of(old) == self.run:
                try:
                    remove(old, self.run)
                except OSError as error:  # one checkpoint too many does no harm
                    log.warning(f"{old} could not be removed: {error}")


def remove(checkpoint: Path, run: str) -> None:
    """Delete a checkpoint of `run`. It is renamed first, so that an interruption never leaves half a checkpoint.

    Of a link, only the link is removed. Files that no save writes are kept, in a directory `not-removed-...`.
    """
    leaving = checkpoint.with_name(f"{_TMP_PREFIX.format(run)}{_REMOVED}{checkpoint.name}")
    checkpoint.rename(leaving)
    _remove_partial(leaving)


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
    """Remove what interrupted saves of `run` have left in `directory`. No save of `run` may be in progress."""
    if not directory.is_dir():
        return
    replaced, partial = _REPLACED.format(run), _TMP_PREFIX.format(run)
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
