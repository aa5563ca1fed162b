"""Where checkpoints are saved, and which are kept."""

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

# With the identifier of the run that made them, so that nobody takes another's for its own.
_TMP_PREFIX = ".writing-{}-"
_REPLACED = ".replaced-{}-"
_REMOVED = "removed-"
_SAVED = re.compile(r"(damaged-)?step-\d{8,}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """[checkpoint]: when to save, and what to keep. A run always saves when it ends or is stopped."""

    interval_steps: PositiveCount | None = 1000
    """Optimizer steps between saves; "none": only at the end."""
    keep_last: PositiveCount | None = 3
    """How many of the newest to keep; "none": all."""
    keep_every: PositiveCount | None = None
    """Checkpoints whose step is a multiple of this are kept for good."""
    async_save: bool = False
    """Write in the background: training waits only for a copy of its state, which takes that much more memory."""

    def build(self, directory: Path, world: WorldComm, *, run: str = "") -> CheckpointManager:
        return CheckpointManager(
            directory, world, run=run, keep_last=self.keep_last, keep_every=self.keep_every, async_save=self.async_save
        )


class CheckpointManager:
    """Saves to, lists and loads from one directory of checkpoints. Every rank makes one, at the same time.

    A save that fails, because the disk is full or gone, is told at once and leaves nothing behind; what was saved
    before stays, and training can go on.
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
        """`run` is the identifier of the run, which it writes into its checkpoints and by which it knows them."""
        self.directory = directory
        self.world = world
        self.run = run
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.saved_step: int | None = None
        """Step of the newest save that is known to be complete, equal on all ranks; `wait` brings it up to date."""
        self.failed_steps: list[int] = []
        """Steps whose save failed, as far as is known."""
        self._background: AsyncSaver | None = None
        self._plans: SavePlans | None = None
        self._saving = 0
        if async_save:
            from components.checkpoint.async_saver import AsyncSaver

            self._background = AsyncSaver(world.long_timeout_group)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return list_checkpoints(self.directory)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, once an unfinished save is over."""
        self.wait()
        return max(self.complete(), default=None, key=step_of)

    def save(self, step: int, tensors: dict[str, Any], state: Mapping[str, Any], config: str) -> bool | None:
        """Write the checkpoint of `step` and remove those no longer wanted. Every rank calls it.

        `tensors` is a nested dict of tensors and DTensors, `state` is JSON. A checkpoint of this step that is already
        there is replaced. Tells whether it was saved; asynchronously None, as soon as `tensors` are copied, and then
        `wait` brings `saved_step` or `failed_steps` up to date. A save that is still under way is waited for first.
        """
        self.wait()
        self._saving = step
        final = self.path(step)
        background = self._background
        gather = self.world.gather if background is None else background.gather

        def write(held: dict[str, Any]) -> bool:
            return self._write(final, held, state, config, gather)

        if background is not None:
            background.start(tensors, write)
            return None
        with silence_no_dist_warning():
            self._note(write(tensors))
        return self.saved_step == step

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def wait(self) -> None:
        """Until no save is under way."""
        if self._background is not None and (saved := self._background.wait()) is not None:
            self._note(saved)

    def close(self) -> None:
        """Let an unfinished save end."""
        self.wait()
        if self._background is not None:
            self._background.close()
        if self._plans is not None:
            self._plans.forget()

    def _note(self, saved: bool) -> None:
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
        """Write `final`; whether it could be done is the same on every rank, and was told."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        from components.checkpoint.tensor_writer import SavePlans, TensorWriter

        plans = self._plans = self._plans or SavePlans()
        aside = self.directory / f"{_TMP_PREFIX.format(self.run)}{final.name}"
        writer = TensorWriter(aside)
        if self._background is not None:
            # A copy that is in main memory already needs no stream to bring it there: that of the thread is GPU 0's.
            writer.per_thread_copy_ahead = 0
        group = self._background.group if self._background is not None else None

        def prepare() -> None:
            if self.world.is_main:
                _remove_partial(aside)
                aside.mkdir(parents=True)

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
            write_part(aside, self.world.rank)

        def complete() -> None:
            if self.world.is_main:
                self._complete(aside, final, state, config)

        try:
            for part in (prepare, write, complete):
                run_on_all_ranks(part, gather)
        except Exception as error:
            log.error(f"{final} could not be saved: {error}. The checkpoints before it stay")
            plans.forget()
            if self.world.is_main:
                with suppress(OSError):
                    _remove_partial(aside)  # on a full disk it is in the way of the next one
            return False
        if self._background is not None:
            log.info(f"saved {final}")
        return True

    def _complete(self, aside: Path, final: Path, state: Mapping[str, Any], config: str) -> None:
        """Every rank's files are in `aside`: add the rest, give it its name, remove what is no longer wanted."""
        write_fsync(aside / "state.json", json.dumps({"format": FORMAT, **state}, indent=1))
        write_fsync(aside / "config.toml", config)
        write_manifest(aside, self.world.size, self.run)
        fsync_directory(aside)
        replaced = self.directory / f"{_REPLACED.format(self.run)}{final.name}"
        if os.path.lexists(final):
            if run_of(final) != self.run:
                raise OSError("there is a checkpoint of this name that this run did not write")
            final.rename(replaced)
        try:
            aside.rename(final)
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
        for old in self.complete()[: -self.keep_last]:
            if (self.keep_every is None or step_of(old) % self.keep_every) and run_of(old) == self.run:
                try:
                    remove(old, self.run)
                except OSError as error:  # what is too much is no harm
                    log.warning(f"{old} could not be removed: {error}")


def remove(checkpoint: Path, run: str) -> None:
    """Delete a checkpoint of `run`: whatever interrupts that, half of it never bears its name.

    Of a link only the link goes. Files in it that no save writes stay, in a directory `not-removed-...`.
    """
    leaving = checkpoint.with_name(f"{_TMP_PREFIX.format(run)}{_REMOVED}{checkpoint.name}")
    checkpoint.rename(leaving)
    _remove_partial(leaving)


def remove_all(directory: Path, run: str) -> None:
    """Delete every checkpoint that `run` wrote to `directory`, damaged ones too, and the directory if it is empty.

    A directory that is behind a link stays. Raises OSError for what cannot be removed.
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
    """Remove what dead saves of `run` have left in a directory of checkpoints. It may not be saving there now."""
    if not directory.is_dir():
        return
    replaced, aside = _REPLACED.format(run), _TMP_PREFIX.format(run)
    leftovers = sorted(directory.iterdir())
    for leftover in leftovers:
        if leftover.name.startswith(replaced):
            final = directory / leftover.name.removeprefix(replaced)
            if os.path.lexists(final):
                _remove_partial(leftover)
            else:  # killed between two renames: the one to be replaced is the one there is
                leftover.rename(final)
        elif leftover.name.startswith(aside):
            _remove_partial(leftover)


def _remove_partial(leftover: Path) -> None:
    """Remove what saves have written to `leftover`. Anything else in it stays, under a name that can be seen."""
    if os.path.lexists(leftover) and not remove_files(leftover, WRITTEN.fullmatch):
        step = leftover.name.rpartition("step-")[2]
        leftover.rename(leftover.with_name(f"not-removed-step-{step}-{uuid.uuid4().hex[:6]}"))
