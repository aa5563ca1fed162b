"""Where checkpoints are saved, and which are kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.checkpoint.errors import SaveError
from components.checkpoint.ranks import Ranks
from components.checkpoint.reading import FORMAT, complete_checkpoints, single_process_is_fine, step_of
from components.quantities import PositiveCount

if TYPE_CHECKING:
    from components.checkpoint.background import Background

_ASIDE = ".writing-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """[checkpoint]: when to save, and what to keep. A run always saves when it ends or is stopped."""

    interval_steps: PositiveCount | None = None
    """Optimizer steps between saves; unset: only at the end."""
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
    """Saves to, lists and loads from one directory of checkpoints. Every rank makes one, at the same time."""

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
        self._background: Background | None = None
        if async_save:
            from components.checkpoint.background import Background

            self._background = Background(distributed=world.size > 1)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return complete_checkpoints(self.directory)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, once an unfinished save is over. Raises SaveError as `wait` does."""
        self.wait()
        return max(self.complete(), default=None, key=step_of)

    def clean(self) -> None:
        """Remove what dead saves have left. Call once, before the first save."""
        if self.world.is_main and self.directory.is_dir():
            for leftover in self.directory.glob(f"{_ASIDE}*"):
                shutil.rmtree(leftover)

    def save(self, step: int, tensors: dict[str, Any], state: Mapping[str, Any], config: str) -> Path:
        """Write the checkpoint of `step` and remove those no longer wanted. Every rank calls it; returns its path.

        `tensors` is a nested dict of tensors and DTensors, `state` is JSON. A checkpoint of this step that is already
        there is replaced. Asynchronously it returns as soon as `tensors` are copied, and `wait` tells how it went;
        a save that is still under way is waited for first. Raises SaveError when that one failed.
        """
        self.wait()
        final = self.directory / f"step-{step:08d}"
        aside = self.directory / f"{_ASIDE}{final.name}"
        if self.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.world.barrier()

        def complete() -> None:
            if self.world.is_main:
                self._complete(aside, final, state, config)

        if self._background is not None:
            self._background.save(aside, tensors, final, complete)
            return final
        import torch.distributed.checkpoint as dcp

        with single_process_is_fine():
            dcp.save(tensors, checkpoint_id=aside, no_dist=self.world.size == 1)
        complete()
        self.world.barrier()
        return final

    def wait(self) -> None:
        """Until no save is under way. Raises SaveError, naming the path, when the last one failed; every rank does."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Let an unfinished save end. An error was logged when it happened and is not raised: this is the way out."""
        if self._background is not None:
            with suppress(SaveError):
                self._background.wait()
            self._background.close()

    def _complete(self, aside: Path, final: Path, state: Mapping[str, Any], config: str) -> None:
        """Every rank's files are in `aside`: add the rest, give it its name, remove what is no longer wanted."""
        _write_synced(aside / "state.json", json.dumps({"format": FORMAT, **state}, indent=1))
        _write_synced(aside / "config.toml", config)
        _sync(aside)
        replaced = self.directory / f"{_ASIDE}replaced-{final.name}"
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        for old in self.complete()[: -self.keep_last]:
            if self.keep_every is None or step_of(old) % self.keep_every:
                shutil.rmtree(old)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
