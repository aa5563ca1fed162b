"""Checkpoints in the main memory of the nodes, from which a run continues after the loss of processes or of a node.

A node keeps the tensor files of its own processes and, with several nodes, those of the node before it, so that all
files still exist after the loss of one node. The directory has the format of a checkpoint on disk, without hashes:

    HOST_MEMORY/step-00000123/
        __RANK_*.distcp                         some of the tensor files
        .metadata, state.json, config.toml      as in any checkpoint
        files.json                              names and sizes of all tensor files, and an identifier of this save

The newest one is kept. While the next one is written there are two.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from components.atomic_files import remove_files, write_fsync
from components.checkpoint.async_saver import AsyncSaver
from components.checkpoint.commit import CheckpointWriter, format_state
from components.checkpoint.file_transfer import Received, Sent, transfer
from components.checkpoint.load import list_checkpoints, step_name, step_of
from components.checkpoint.manifest import WRITTEN
from components.distributed.collectives import broadcast_object, raise_on_all_ranks, run_on_all_ranks
from components.interfaces import WorldComm
from components.json_files import read_object

_FILES = "files.json"
_COMMON = (".metadata", "state.json", "config.toml", _FILES)
"""Files that every node has."""
_TENSORS = "*.distcp"


class InMemoryWriter(CheckpointWriter):
    """Writes the checkpoints of a run to the main memory of the nodes."""

    def __init__(self, world: WorldComm, *, directory: Path, run: str, saver: AsyncSaver | None) -> None:
        super().__init__(world, run=run, saver=saver)
        self._directory = directory
        self._common: dict[str, bytes] = {}

    @property
    def makes_directory(self) -> bool:
        return self.world.rank % self.world.local_size == 0

    def write_step(self, step: int, tensors: dict[str, Any], state: Mapping[str, Any], config: str) -> bool:
        """Write the checkpoint of `step` and remove the one before it; return whether that succeeded, on every rank."""
        final = self._directory / step_name(step)
        written = self.write(final, tensors, state, config)
        if written and self.makes_directory:
            keep_only(self._directory, final)  # not before all nodes have the new one
        return written

    def finish_files(self, temporary: Path, state: Mapping[str, Any], config: str) -> None:
        """Send the tensor files of this rank to the next node, and the files in `_COMMON` to all nodes."""
        world = self.world
        own = {path.name: path.stat().st_size for path in temporary.glob(f"__{world.rank}_*")}
        files = self.gather(own)
        if world.is_main:
            save = {"save": uuid.uuid4().hex, "files": {name: size for each in files for name, size in each.items()}}
            self._common = {
                ".metadata": (temporary / ".metadata").read_bytes(),
                "state.json": format_state(state).encode(),
                "config.toml": config.encode(),
                _FILES: json.dumps(save).encode(),
            }
        if world.size > 1:
            self._common = broadcast_object(self._common, source=0, group=self.group)
        if world.size == world.local_size:
            return
        following = (world.rank + world.local_size) % world.size
        before = (world.rank - world.local_size) % world.size
        sent = [Sent(temporary / name, following) for name in own]
        received = [Received(temporary / name, size, before) for name, size in files[before].items()]
        for each in zip_longest(sent, received):  # a rank has one file, or none if others have written its shards
            transfer(*each, self.group)

    def commit(self, temporary: Path, final: Path, state: Mapping[str, Any], config: str) -> None:
        """Complete `temporary` on this node and rename it to `final`."""
        _complete(temporary, final, self._common)


class InMemoryCheckpoint(NamedTuple):
    """A checkpoint whose tensor files are spread over the memory of the nodes."""

    path: Path
    """The directory on this node: the tensor files of other nodes are sparse files of the right size."""
    holders: list[set[str]]
    """The tensor files of the node of each rank, by rank."""
    files: dict[str, int]
    """All tensor files, with their sizes."""
    world: WorldComm

    @classmethod
    def find(cls, directory: Path | None, world: WorldComm, *, newer_than: int) -> InMemoryCheckpoint | None:
        """Return the newest checkpoint whose files all exist on some node; None if there is none after `newer_than`.

        Every rank calls it, with the directory of its node. Other checkpoints in memory are removed.
        """
        listed = [] if directory is None else list_checkpoints(directory)
        found = {step_of(path): described for path in listed if (described := _describe(path)) is not None}
        gathered = world.gather((directory is not None, found))
        nodes = [held for _, held in gathered]
        everywhere = all(has_directory for has_directory, _ in gathered)
        saves = {(step, each["save"]) for held in nodes for step, each in held.items()}
        for step, save in sorted(saves, reverse=True):
            if directory is None or not everywhere or step <= newer_than:
                break
            copies = [held.get(step, {}) for held in nodes]
            copies = [copy if copy.get("save") == save else {} for copy in copies]
            holders = [set(copy.get("held", ())) for copy in copies]
            source = next(rank for rank, copy in enumerate(copies) if copy)
            files: dict[str, int] = copies[source]["files"]
            if set().union(*holders) >= files.keys():
                checkpoint = cls(directory / step_name(step), holders, files, world)
                run_on_all_ranks(lambda c=checkpoint, s=source: c._open(s), world.gather)  # type: ignore[misc]
                return checkpoint
        if directory is not None and world.rank % world.local_size == 0:
            keep_only(directory, None)
        return None

    def fetch(self, wanted: Collection[str]) -> None:
        """Copy the tensor files that this rank is going to read, `wanted`, from other nodes. Every rank calls it."""
        world = self.world
        wants = world.gather(set(wanted))
        failure: OSError | None = None
        for first in range(0, world.size, world.local_size):  # of each node; all ranks go in the same order
            node = range(first, first + world.local_size)
            for name in sorted(set().union(*(wants[rank] for rank in node)) - self.holders[first]):
                source = next(rank for rank, held in enumerate(self.holders) if name in held)
                if world.rank == source:
                    transfer(Sent(self.path / name, first), None, None)
                elif world.rank == first:
                    try:
                        transfer(None, Received(self.path / name, self.files[name], source), None)
                    except OSError as error:
                        failure = error
        raise_on_all_ranks(failure, world.gather)

    def _open(self, source: int) -> None:
        """Complete the directory on this node, except for the content of the tensor files of other nodes.

        These are sparse files of the right size, which the reader of the metadata checks; they take no memory.
        """
        world = self.world
        is_source = world.rank == source
        common = {name: (self.path / name).read_bytes() for name in _COMMON} if is_source else {}
        if world.size > 1:
            common = broadcast_object(common, source)
        if world.rank % world.local_size:
            return
        if not self.holders[world.rank]:  # the node joined, or has another save of this step
            temporary = self.path.with_name(f".{self.path.name}")
            temporary.mkdir(exist_ok=True)
            _complete(temporary, self.path, common)
        for name in self.files.keys() - self.holders[world.rank]:
            with (self.path / name).open("wb") as file:
                file.truncate(self.files[name])
        keep_only(self.path.parent, self.path)


def keep_only(directory: Path, kept: Path | None) -> None:
    """Remove the checkpoints in the memory of this node, complete or not, except `kept`."""
    for path in list(directory.iterdir()):
        if path != kept and path.is_dir():
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Remove the files of a save. It is renamed first, so that an interruption never leaves half a checkpoint."""
    leaving = checkpoint.with_name(f".removed-{uuid.uuid4().hex}")
    checkpoint.rename(leaving)
    remove_files(leaving, WRITTEN.fullmatch)


def _complete(temporary: Path, final: Path, common: Mapping[str, bytes]) -> None:
    for name, content in common.items():
        write_fsync(temporary / name, content)
    if final.exists():
        _remove(final)
    temporary.rename(final)


def _describe(checkpoint: Path) -> dict[str, Any] | None:
    """Return the content of files.json, and "held": the names of the tensor files whose content this node has; None if
    files.json cannot be read.
    """
    try:
        described = read_object(checkpoint / _FILES)
    except (OSError, ValueError):  # on one node only: the others would wait for it
        return None
    # the file of another node is sparse, and one that was only partly received is shorter
    found = {path.name: path.stat() for path in checkpoint.glob(_TENSORS)}
    held = [
        name for name, stat in found.items() if described["files"].get(name) == stat.st_size <= stat.st_blocks * 512
    ]
    return {**described, "held": held}
