"""RunDirectory: the directory of a run, its files, owner and lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from components.atomic_files import atomic_write, temporary_files_of
from components.errors import InputError
from components.json_files import read_object

LOCK = ".run.lock"
FLIGHT_RECORDER = "nccl_trace_rank_"
"""Prefix, before the rank, of the files that NCCL's flight recorder writes when a collective times out."""
_LOCK_PREFIX = "process"
_RUN = re.compile(r"[0-9a-f]{16}")
_LOCK_TIMEOUT_SECONDS = 10.0
"""How long to wait for the lock: the workers of a killed run may take a moment to exit."""


class RunDirectory:
    """The directory of one run, and the paths of the files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.profile = path / "profile"
        self.environment = path / "environment.json"
        """Versions and devices of each start of the run."""
        self.writers = path / "writers"
        """What the writers of metrics need to continue after a restart."""
        self.owner_file = path / "run.json"
        """Identifies the run that owns the directory; without it, no file in it is overwritten or removed."""
        self.stop_file = path / "stop"
        """If this file exists, the run saves a checkpoint and stops."""

    @property
    def run(self) -> str | None:
        """Identifier of the run that owns the directory; None without an owner."""
        return self._read_owner().get("run")

    def owned_by(self, launch: str | None) -> bool:
        """Return whether `launch`, the name of a launch of processes, was recorded as an owner before."""
        return launch is not None and launch in self._read_owner().get("launches", ())

    def claim(self, kind: str = "a training run", also: Iterable[Path] = ()) -> None:
        """Make a run of this kind the owner of the directory, unless it is already owned by one.

        `also` lists files that a run of this kind writes in addition to those of every run. Raises ValueError for the
        directory of a run of another kind, and for files that no run wrote and this run would overwrite.
        """
        owner = self._read_owner()
        if owner:
            if owner["kind"] != kind:
                raise InputError("name", f"{self.path} holds {owner['kind']}; use another --run.name")
            return
        if found := self.unowned_files(also):
            raise ValueError(
                f"{self.path} holds {', '.join(found)}, which this run would overwrite or remove, and no "
                f"{self.owner_file.name}, which every run writes. Move them away, or use another --run.name. To "
                f"continue from a checkpoint in there, use --resume={self.path} with another --run.name"
            )
        self._write_owner({"kind": kind, "run": new_identifier(), "launches": []})

    def unowned_files(self, also: Iterable[Path] = ()) -> list[str]:
        """Return the names of files that a run would overwrite in a directory without owner, except empty ones."""
        if self.run is not None:
            return []
        files = (self.owner_file, self.config, self.metrics, self.log, *also)
        names = [path.name for path in files if _has_content(path)]
        return [*names, self.stop_file.name] if os.path.lexists(self.stop_file) else names

    def record_owner(self, run: str, launches: Iterable[str]) -> None:
        """Record the identifier of the run, and `launches`, the names of the launch on each node, as owners: any of
        them may restart the run.
        """
        self._write_owner({**self._read_owner(), "run": run, "launches": list(dict.fromkeys(launches))})

    def _read_owner(self) -> dict[str, Any]:
        try:
            owner = read_object(self.owner_file)
        except (OSError, ValueError):
            return {}
        known = isinstance(owner.get("kind"), str) and isinstance(owner.get("launches"), list)
        return owner if known and _RUN.fullmatch(str(owner.get("run"))) else {}

    def _write_owner(self, owner: Mapping[str, Any]) -> None:
        atomic_write(self.owner_file, json.dumps(owner, indent=1) + "\n")

    @property
    def has_run(self) -> bool:
        """Whether the owner has made a step or saved a checkpoint."""
        return self.run is not None and (self.metrics.exists() or any(self.checkpoints.glob("step-*")))

    def check_links(self, *also: Path) -> None:
        """Raise ValueError if a directory of the run is a broken link, where nothing can be saved."""
        for folder in (self.path, self.checkpoints, self.tensorboard, *also):
            if folder.is_symlink() and not folder.is_dir():
                raise ValueError(
                    f"{folder} is a link to {folder.readlink()}, which is not a directory; mount or create it, or "
                    "remove the link"
                )

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Create the directory and lock it for this process.

        Yields False if the file system, such as some network file systems, does not support locks. The kernel releases
        the lock when the process ends. An empty directory is removed afterwards. Raises ValueError while another run
        has the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(self.path / LOCK, self.path) as locked:
                yield locked
        finally:
            with suppress(OSError):
                self.path.rmdir()

    def remove_temporary_files(self, *also: Path) -> None:
        """Remove temporary files of killed processes of the run. The caller must have the lock."""
        if self.run is not None:
            for file in (self.owner_file, self.config, self.environment, *also):
                for leftover in temporary_files_of(file):
                    leftover.unlink(missing_ok=True)

    def clear(self, log_from: int | None = None) -> None:
        """Remove the files that the owner has written, except its checkpoints and `owner_file`.

        Other files are kept; of a link, only the link is removed. With `log_from`, only the part of the log before that
        byte is removed. Raises OSError for files that cannot be removed, because they would be mixed with the new run.
        """
        run = self.run
        if run is None:
            return
        traces = [*self.profile.glob("steps-*-rank-*"), *self.path.glob(f"{FLIGHT_RECORDER}*")]
        # The metrics last: `has_run` must stay true until all other files are removed.
        states = self.writers.glob("*.json")
        files = (*self.tensorboard.glob(f"events.*.{run}"), *traces, *states, self.environment, self.config)
        for file in (*files, self.metrics):
            file.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.profile, self.writers):
            if not folder.is_symlink():
                with suppress(OSError):  # not empty, or missing
                    folder.rmdir()
        if log_from is None:
            self.log.unlink(missing_ok=True)
        elif self.log.exists() and not self.log.is_symlink():
            rest = self.log.read_bytes()[log_from:]
            with self.log.open("r+b") as file_of_log:  # in place: the log is open for appending
                file_of_log.truncate(0)
                file_of_log.write(rest)

    def release(self) -> None:
        """Remove the owner of the directory, after `clear`, and the directory if it is empty."""
        self.owner_file.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()


def new_identifier() -> str:
    """Return a random identifier of a run."""
    return uuid.uuid4().hex[:16]


def _has_content(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


@contextmanager
def _locked(file: Path, directory: Path) -> Iterator[bool]:
    """Lock `file`, and remove it afterwards. On NFS, the lock of a directory would only hold on this machine."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_SECONDS
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        holder = os.pread(handle, 1000, 0).decode(errors="replace").strip()
        if holder and not holder.startswith(_LOCK_PREFIX):  # the file would be overwritten and removed
            os.close(handle)
            raise ValueError(f"{file} is not the lock file of a run; move it away, or use another --run.name")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                file.unlink(missing_ok=True)
                yield False
                return
            if time.monotonic() > deadline:
                raise InputError(
                    "name",
                    f"another run is writing to {directory} ({holder or 'unknown process'}); stop it, wait for it, "
                    "or use another --run.name",
                ) from None
            time.sleep(0.1)
            continue
        if _is_same_file(file, handle):
            break
        os.close(handle)  # its owner has removed the file meanwhile
    try:
        with suppress(OSError):  # the lock also works on a full disk, without the text
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{_LOCK_PREFIX} {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield True
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _is_same_file(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
