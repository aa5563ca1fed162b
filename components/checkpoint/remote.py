"""Checkpoints at an address, in the layout of a run directory: upload, download, listing and removal.

    ADDRESS/<run>/
        run.json, metrics.jsonl, ...        of the run directory, as of the newest checkpoint
        checkpoints/step-00000123/          the files of the checkpoint; manifest.json is written last and removed first

A directory without a manifest is left from an interrupted upload, and not a checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path

from components.atomic_files import fsync_directory, fsync_file
from components.checkpoint.commit import TMP_PREFIX, mark_damaged, remove_partial_saves
from components.checkpoint.load import DamagedError, list_checkpoints, old_checkpoints, step_of
from components.checkpoint.manifest import MANIFEST, WRITTEN, Manifest
from components.json_files import LARGEST_BYTES
from components.storage.address import RemoteDirectory, StorageError, address_of
from components.storage.local_copy import fetch

log = logging.getLogger("powertrain")

_RUN = re.compile(r"[0-9a-f]{16}")
"""Identifier of a run, as in run.json."""
_RUN_FILE = re.compile(r"run\.json|metrics\.jsonl|environment\.json|log\.txt|writers/[A-Za-z0-9_-]+\.json")
"""Files of the run directory that a run needs to continue on another machine."""
_UPLOADED = re.compile(rf"{WRITTEN.pattern}|\.({WRITTEN.pattern})\.partial")
"""Files of a checkpoint, and partial copies of them."""


class RemoteCheckpoints:
    """The checkpoints of a run at an address. All methods raise StorageError if the storage cannot be used."""

    def __init__(self, directory: RemoteDirectory) -> None:
        """`directory` is that of the run."""
        self.directory = directory
        self._checkpoints = directory.child("checkpoints")
        self._uploading = b""
        """Manifest of the checkpoint that `upload` started last."""
        self._uploaded: set[str] = set()
        """Its files that are uploaded already, so that a retry continues where the failed attempt ended."""

    def list_complete(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        found = self._checkpoints.list_files(f"step-*/{MANIFEST}")
        names = (file.partition("/")[0] for file in found)
        return sorted((name for name in names if _step(name) >= 0), key=_step)

    def run_of(self, name: str) -> str | None:
        """Return the identifier of the run that wrote a checkpoint; None without a readable manifest."""
        try:
            return Manifest.model_validate_json(self._read_manifest(name)).run
        except ValueError:
            return None

    def newest_run(self) -> str | None:
        """Return the identifier of the run that wrote the newest complete checkpoint; None if there is none."""
        names = self.list_complete()
        return self.run_of(names[-1]) if names else None

    def upload(self, checkpoint: Path) -> bool:
        """Copy `checkpoint` of a run directory, and the files of that directory that a run needs to continue.

        Return False if it is already uploaded. Another checkpoint of this name is made incomplete first.
        """
        manifest = (checkpoint / MANIFEST).read_bytes()
        remote = self._checkpoints.child(checkpoint.name)
        if there := self._read_manifest(checkpoint.name):
            if there == manifest:
                return False
            remote.remove([MANIFEST])
        run = checkpoint.parent.parent
        files = {path.relative_to(run).as_posix(): path for path in (*run.glob("*.*"), *run.glob("writers/*.json"))}
        self.directory.upload({name: path for name, path in files.items() if _RUN_FILE.fullmatch(name)})
        if self._uploading != manifest:
            self._uploading, self._uploaded = manifest, set()
        for name in sorted(Manifest.model_validate_json(manifest).files.keys() - self._uploaded):
            remote.upload({name: checkpoint / name})
            self._uploaded.add(name)
        if (checkpoint / MANIFEST).read_bytes() != manifest:
            raise StorageError(f"{checkpoint} was replaced while it was uploaded")
        remote.upload({MANIFEST: checkpoint / MANIFEST})
        self._uploading = b""
        return True

    def download(self, name: str, directory: Path, run: str) -> Path:
        """Copy a complete checkpoint into `directory` and return its path; a partial copy never has its name.

        A damaged checkpoint of this name is renamed once the copy is complete.
        """
        target, temporary = directory / name, directory / f"{TMP_PREFIX.format(run)}{name}"
        manifest = self._read_manifest(name)
        try:
            files = [name for name in Manifest.model_validate_json(manifest).files if WRITTEN.fullmatch(name)]
        except ValueError as error:
            raise DamagedError(f"{self._checkpoints}/{name} is damaged: {MANIFEST}: {error}") from None
        log.info(f"downloading {self._checkpoints}/{name}")
        temporary.mkdir(parents=True, exist_ok=True)
        remote = self._checkpoints.child(name)
        remote.download({file: temporary / file for file in files})
        (temporary / MANIFEST).write_bytes(manifest)
        for path in temporary.iterdir():
            fsync_file(path)
        fsync_directory(temporary)
        if target.exists():
            mark_damaged(target)
        temporary.rename(target)
        fsync_directory(directory)
        return target

    def download_run_files(self, run_directory: Path) -> None:
        """Copy the files of the run directory that do not exist locally, each atomically."""
        listed = self.directory.list_files("*.*") | self.directory.list_files("writers/*.json")
        for name, (size, _) in listed.items():
            path = run_directory / name
            if _RUN_FILE.fullmatch(name) and not path.exists():
                self.directory.download_file(name, path, size)

    def remove(self, name: str) -> None:
        """Delete a checkpoint: first its manifest, so that an interrupted removal does not leave half a checkpoint."""
        remote = self._checkpoints.child(name)
        files = [file for file in remote.list_files() if _UPLOADED.fullmatch(file)]
        remote.remove(sorted(files, key=lambda file: file != MANIFEST))
        if not remote.list_files():
            remote.remove_empty()

    def remove_old(self, run: str, *, keep_last: int | None, keep_every: int | None) -> None:
        """Delete the complete checkpoints of `run` that are not to be kept, and leftovers of interrupted uploads."""
        complete = self.list_complete()
        self._remove_of(run, [path.name for path in old_checkpoints(list(map(Path, complete)), keep_last, keep_every)])
        incomplete = {name.partition("/")[0] for name in self._checkpoints.list_files()} - {*complete}
        for name in incomplete:
            if complete and 0 <= _step(name) < _step(complete[-1]):
                self.remove(name)

    def remove_all(self, run: str) -> None:
        self._remove_of(run, self.list_complete())

    def _remove_of(self, run: str, names: list[str]) -> None:
        for name in names:
            if self.run_of(name) == run:
                self.remove(name)

    def _read_manifest(self, name: str) -> bytes:
        """Return manifest.json; empty if there is none."""
        return self._checkpoints.child(name).read(MANIFEST, LARGEST_BYTES) or b""


def restore_run(
    remote: RemoteCheckpoints, run_directory: Path, owner: str | None, *, damaged: Collection[Path] = ()
) -> None:
    """Before a run is resumed, download its newest checkpoint if the local ones are older or there are none.

    `owner` is the identifier of the run that owns the directory, if there is one. Local checkpoints that are `damaged`
    do not count. If the storage cannot be reached, local checkpoints are used, with a warning. Raises ValueError if the
    checkpoint there is of another run.
    """
    directory = run_directory / "checkpoints"
    local = [checkpoint for checkpoint in list_checkpoints(directory) if checkpoint not in damaged]
    try:
        names = remote.list_complete()
        if not names or (local and step_of(local[-1]) >= _step(names[-1])):
            return
        run = remote.run_of(names[-1]) or ""
        if owner is not None and run != owner:
            raise ValueError(
                f"{remote.directory} holds checkpoints of another run than {run_directory}; give this run another "
                "--run.name, or resume the other one with --resume=ADDRESS"
            )
        if not _RUN.fullmatch(run):  # it becomes a part of a path
            raise DamagedError(f"{remote.directory}: {MANIFEST} of {names[-1]} names no run")
        if not local:
            remote.download_run_files(run_directory)
        remove_partial_saves(directory, run)
        remote.download(names[-1], directory, run)
    except StorageError as error:
        if not local and not damaged:
            raise
        log.warning(f"{error}; continuing from the newest local checkpoint")


def fetch_model(path: Path) -> None:
    """If `path` is the local copy of an address, fetch the checkpoint, or the newest of the run directory, or the
    Hugging Face directory there.
    """
    address = address_of(path)
    if address is None:
        return
    remote = RemoteCheckpoints(RemoteDirectory(address))
    try:
        names = remote.list_complete()
    except StorageError as error:
        if not list_checkpoints(path / "checkpoints"):
            raise
        log.warning(f"{error}; using the newest checkpoint of the copy from an earlier run")
        return
    fetch(path / "checkpoints" / names[-1] if names else path)


def _step(name: str) -> int:
    """Return the step of a checkpoint; -1 for a directory with another name."""
    return step_of(Path(name))
