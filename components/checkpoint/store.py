"""Where checkpoints are saved, and which are kept."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.checkpoint.manifest import write_manifest, write_part
from components.checkpoint.ranks import Ranks, together
from components.checkpoint.reading import (
    FORMAT,
    complete_checkpoints,
    first_failure,
    single_process_is_fine,
    step_of,
)
from components.durable import sync_directory, write_synced
from components.quantities import PositiveCount

if TYPE_CHECKING:
    from components.checkpoint.background import Background
    from components.checkpoint.save_plans import SavePlans

log = logging.getLogger("powertrain")

_ASIDE = ".writing-"
_REPLACED = ".replaced-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """[checkpoint]: when to save, and what to keep. A run always saves when it ends or is stopped."""

    interval_steps: PositiveCount | None = 1000
    """Optimizer steps between saves; "none": only at the end."""
    keep_last: PositiveCount | None = 3
    """How many of the newest to keep; "none": all."""
    keep_every: PositiveCount | None = None
    """Checkpoints whose step is a multiple of this are kept for good."""
    async_save: bool = False
    """Write in the background: training waits only for a copy of its state, which takes that much more memory."""

    def build(self, directory: Path, world: Ranks) -> CheckpointStore:
        return CheckpointStore(
            directory, world, keep_last=self.keep_last, keep_every=self.keep_every, async_save=self.async_save
        )


class CheckpointStore:
    """Saves to, lists and loads from one directory of checkpoints. Every rank makes one, at the same time.

    A save that fails, because the disk is full or gone, is told at once and leaves nothing behind; what was saved
    before stays, and training can go on.
    """

    def __init__(
        self,
        directory: Path,
        world: Ranks,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        async_save: bool = False,
    ) -> None:
        self.directory = directory
        self.world = world
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.saved_step: int | None = None
        """Step of the newest save that is known to be complete, equal on all ranks; `wait` brings it up to date."""
        self.failed_steps: list[int] = []
        """Steps whose save failed, as far as is known."""
        self._background: Background | None = None
        self._plans: SavePlans | None = None
        self._saving = 0
        if async_save:
            from components.checkpoint.background import Background

            self._background = Background(world.waiting)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return complete_checkpoints(self.directory)

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
        with single_process_is_fine():
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
        from torch.distributed.checkpoint import FileSystemWriter
        from torch.distributed.checkpoint.api import CheckpointException

        from components.checkpoint.save_plans import SavePlans

        plans = self._plans = self._plans or SavePlans()
        aside = self.directory / f"{_ASIDE}{final.name}"
        writer = FileSystemWriter(aside)
        if self._background is not None:
            # A copy that is in main memory already needs no stream to bring it there: that of the thread is GPU 0's.
            writer.per_thread_copy_ahead = 0
        group = self._background.group if self._background is not None else None

        def prepare() -> None:
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
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
                raise OSError(str(first_failure(error))) from error
            write_part(aside, self.world.rank)

        def complete() -> None:
            if self.world.is_main:
                self._complete(aside, final, state, config)

        try:
            for part in (prepare, write, complete):
                together(part, gather)
        except Exception as error:
            log.error(f"{final} could not be saved: {error}. The checkpoints before it stay")
            plans.forget()
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)  # on a full disk it is in the way of the next one
            return False
        if self._background is not None:
            log.info(f"saved {final}")
        return True

    def _complete(self, aside: Path, final: Path, state: Mapping[str, Any], config: str) -> None:
        """Every rank's files are in `aside`: add the rest, give it its name, remove what is no longer wanted."""
        write_synced(aside / "state.json", json.dumps({"format": FORMAT, **state}, indent=1))
        write_synced(aside / "config.toml", config)
        write_manifest(aside, self.world.size)
        sync_directory(aside)
        replaced = self.directory / f"{_REPLACED}{final.name}"
        if final.exists():
            final.rename(replaced)
        try:
            aside.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        for old in self.complete()[: -self.keep_last]:
            if self.keep_every is None or step_of(old) % self.keep_every:
                try:
                    remove(old)
                except OSError as error:  # what is too much is no harm
                    log.warning(f"{old} could not be removed: {error}")


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint: whatever interrupts that, half of it never bears its name."""
    leaving = checkpoint.with_name(f"{_ASIDE}removed-{checkpoint.name}")
    checkpoint.rename(leaving)
    shutil.rmtree(leaving)


def clean(directory: Path) -> None:
    """Remove what dead saves have left in a directory of checkpoints. Nobody may be writing there."""
    if not directory.is_dir():
        return
    for replaced in directory.glob(f"{_REPLACED}*"):
        final = directory / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:  # killed between two renames: the one to be replaced is the one there is
            replaced.rename(final)
    for leftover in directory.glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover)
