"""[checkpoint], and CheckpointManager: when to save, which checkpoints to keep. commit.py writes and removes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.checkpoint.commit import CheckpointWriter, remove
from components.checkpoint.host_memory import host_memory_directory
from components.checkpoint.load import list_checkpoints, old_checkpoints, step_name, step_of
from components.checkpoint.manifest import run_of
from components.errors import InputError
from components.interfaces import WorldComm
from components.storage.address import is_address, refuse_password
from components.units import PositiveCount

if TYPE_CHECKING:
    from components.checkpoint.async_saver import AsyncSaver
    from components.checkpoint.in_memory import InMemoryWriter
    from components.checkpoint.remote import RemoteCheckpoints
    from components.checkpoint.uploader import CheckpointUploader

log = logging.getLogger("powertrain")


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

    in_memory_interval_steps: PositiveCount | None = None
    """Optimizer steps between copies of the state in the main memory of the nodes, each of them on two nodes. A run
    that its launcher restarts continues from them, also without one of its nodes, if they are newer than the
    checkpoints on disk."""

    remote: str | None = None
    """Address of a directory, such as "s3://bucket/runs": checkpoints are uploaded in the background, to a directory
    with the name of the run; `keep_last` and `keep_every` hold there too, and --resume finds the newest."""

    def __post_init__(self) -> None:
        if self.remote is not None and not is_address(self.remote):
            raise InputError("remote", f'{self.remote} is not an address, such as "s3://bucket/runs"')
        refuse_password(self.remote or "", "remote")

    def build(self, directory: Path, world: WorldComm, *, run: str = "") -> CheckpointManager:
        """Return the manager of a run. Every rank calls it."""
        in_memory = host_memory_directory() if self.in_memory_interval_steps is not None else None
        if self.in_memory_interval_steps is not None and world.all_reduce_max(int(in_memory is None)):
            in_memory = None  # on all ranks, which save together
            log.warning(
                "checkpoint.in_memory_interval_steps has no effect: it needs /dev/shm on every node, and a launcher "
                "that restarts the processes (MAX_RESTARTS, or NNODES=2:4)"
            )
        return CheckpointManager(
            directory,
            world,
            run=run,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
            async_save=self.async_save,
            in_memory=in_memory,
            remote=self.remote_of(directory.parent),
        )

    def remote_of(self, run_directory: Path) -> RemoteCheckpoints | None:
        """Return the remote checkpoints of the run in `run_directory`; None without `remote`."""
        if self.remote is None:
            return None
        from components.checkpoint.remote import RemoteCheckpoints
        from components.storage.address import RemoteDirectory

        return RemoteCheckpoints(RemoteDirectory(self.remote).child(run_directory.name))


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
        in_memory: Path | None = None,
        remote: RemoteCheckpoints | None = None,
    ) -> None:
        """`run` identifies the run in its checkpoints; the manager deletes only those with this identifier. `in_memory`
        is the directory of this node for `save_in_memory`.
        """
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
        self._saving: int | None = None
        if async_save:
            from components.checkpoint.async_saver import AsyncSaver

            self._saver = AsyncSaver(world.long_timeout_group)
        self._writer = CheckpointWriter(world, run=run, saver=self._saver)
        self._memory_writer: InMemoryWriter | None = None
        if in_memory is not None:
            from components.checkpoint.in_memory import InMemoryWriter

            self._memory_writer = InMemoryWriter(world, directory=in_memory, run=run, saver=self._saver)
        self._uploader: CheckpointUploader | None = None
        if remote is not None and world.is_main:
            from components.checkpoint.uploader import CheckpointUploader

            newest = self.latest()
            if newest is not None and run_of(newest) != run:  # of a run that this one is about to replace
                newest = None
            self._uploader = CheckpointUploader(
                remote, run=run, keep_last=keep_last, keep_every=keep_every, newest=newest
            )

    def list_checkpoints(self) -> list[Path]:
        return list_checkpoints(self.directory)

    def latest(self) -> Path | None:
        """Return the complete checkpoint of the largest step, or None, after waiting for a running save."""
        self.wait()
        return max(self.list_checkpoints(), default=None, key=step_of)

    def save(self, step: int, tensors: dict[str, Any], state: Mapping[str, Any], config: str) -> bool | None:
        """Write the checkpoint of `step` and delete those that are no longer to be kept. Every rank must call it.

        `tensors` is a nested dict of tensors and DTensors; `state` must be serializable as JSON. A checkpoint of the
        same step is replaced. A running save is waited for first.

        Returns whether the checkpoint was saved. An asynchronous save returns None as soon as both are copied;
        `wait` then updates `saved_step` or `failed_steps`.
        """
        final = self.path(step)

        def write(tensors: dict[str, Any], state: Mapping[str, Any]) -> bool:
            return self._writer.write(final, tensors, state, config, after_commit=lambda: self._committed(final))

        self._write(step, tensors, state, write)
        return None if self._saver is not None else self.saved_step == step

    def can_save_in_memory(self) -> bool:
        """Return whether `save_in_memory` would not wait for a running save; equal on all ranks, which must call it."""
        busy = self._saver is not None and self._saver.is_busy
        return self._memory_writer is not None and not self.world.all_reduce_max(int(busy))

    def save_in_memory(self, step: int, tensors: dict[str, Any], state: Mapping[str, Any], config: str) -> None:
        """Keep the state after `step` in the memory of the nodes, instead of the one before. See `save`."""
        writer = self._memory_writer
        assert writer is not None
        self._write(None, tensors, state, lambda tensors, state: writer.write_step(step, tensors, state, config))

    def path(self, step: int) -> Path:
        return self.directory / step_name(step)

    def wait(self) -> None:
        if self._saver is not None and (saved := self._saver.wait()) is not None:
            self._record(saved)

    def close(self) -> None:
        """Wait for a running save and for uploads, and end their threads."""
        self.wait()
        if self._saver is not None:
            self._saver.close()
        self._writer.close()
        if self._memory_writer is not None:
            self._memory_writer.close()
        if self._uploader is not None:
            self._uploader.close()

    def _write(
        self,
        saved_step: int | None,
        tensors: dict[str, Any],
        state: Mapping[str, Any],
        write: Callable[[dict[str, Any], Mapping[str, Any]], bool],
    ) -> None:
        """Call `write`, or start it in the background on copies; its result is recorded for the step `saved_step`."""
        self.wait()
        self._saving = saved_step
        if self._saver is not None:
            copied = deepcopy(dict(state))  # a part may return a list that training changes before it is written
            self._saver.start(tensors, lambda tensors: write(tensors, copied))
            return
        self._record(write(tensors, state))

    def _committed(self, checkpoint: Path) -> None:
        if self._uploader is not None:
            self._uploader.submit(checkpoint)
        try:
            self._prune()
        except OSError as error:  # the checkpoint is complete
            log.warning(f"the old checkpoints in {self.directory} could not be listed: {error}")

    def _record(self, saved: bool) -> None:
        step, self._saving = self._saving, None
        if step is None:  # a save in memory
            return
        if saved:
            self.saved_step = step
        else:
            self.failed_steps.append(step)

    def _prune(self) -> None:
        """Delete the checkpoints that are no longer to be kept. A validation that is due runs after the save, so that
        its loss is not known here.
        """
        for old in old_checkpoints(self.list_checkpoints(), self.keep_last, self.keep_every):
            if self._uploader is not None and self._uploader.is_needed(old):
                continue  # a later save removes it
            if run_of(old) == self.run:
                try:
                    remove(old, self.run)
                except OSError as error:  # an extra checkpoint is harmless
                    log.warning(f"{old} could not be removed: {error}")
