"""The run directory: where everything a run leaves behind is."""

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

LOCK = ".run.lock"
FLIGHT_RECORDER = "nccl_trace_rank_"
"""Beginning of the names, before the rank, of what NCCL's flight recorder writes when a collective times out."""
_NOTE = "process"
_RUN = re.compile(r"[0-9a-f]{16}")
_PATIENCE_SECONDS = 10.0
"""How long one waits for another run to leave: what was just killed may have processes that have yet to notice."""


class RunDirectory:
    """The directory of one run, and the places in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.profile = path / "profile"
        self.owner_file = path / "run.json"
        """Makes the directory that of a run: what is in it belongs to the run only if this file says so."""
        self.stop_file = path / "stop"
        """Once there is a file of this name, the run saves and stops."""

    @property
    def run(self) -> str | None:
        """Identifier of the run whose directory this is; None while it is no run's."""
        return self._read_mark().get("run")

    def owned_by(self, launch: str | None) -> bool:
        """Whether `launch`, the name of a start of processes, has made this directory its own before."""
        return launch is not None and launch in self._read_mark().get("launches", ())

    def claim(self, kind: str = "a training run", also: Iterable[Path] = ()) -> None:
        """Make the directory that of a run of this kind, unless it is so already.

        `also` is what a run of this kind writes in addition to what every run does. Raises ValueError for the directory
        of a run of another kind, and where something is in the way that no run has written: it would be overwritten.
        """
        mark = self._read_mark()
        if mark:
            if mark["kind"] != kind:
                raise InputError("name", f"{self.path} holds {mark['kind']}; give this one a --run.name of its own")
            return
        if found := self.foreign(also):
            raise ValueError(
                f"{self.path} holds {', '.join(found)}, and no {self.owner_file.name} that says that a run wrote them; this "
                "run would overwrite or remove them. Move them away, or give it another --run.name. A checkpoint in "
                f"there is continued with --resume={self.path} and another --run.name"
            )
        self._write_mark({"kind": kind, "run": uuid.uuid4().hex[:16], "launches": []})

    def foreign(self, also: Iterable[Path] = ()) -> list[str]:
        """Names of what a run would overwrite in a directory that is no run's. Empty files and folders do not count."""
        if self.run is not None:
            return []
        files = (self.owner_file, self.config, self.metrics, self.log, *also)
        return [path.name for path in files if _has_content(path)] + (
            ["stop"] if os.path.lexists(self.stop_file) else []
        )

    def record_owner(self, launches: Iterable[str]) -> None:
        """Make the directory that of `launches`: each node has its own, and any may be the one that is left."""
        self._write_mark({**self._read_mark(), "launches": list(dict.fromkeys(launches))})

    def _read_mark(self) -> dict[str, Any]:
        try:
            mark = json.loads(self.owner_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        known = isinstance(mark, dict) and isinstance(mark.get("kind"), str) and isinstance(mark.get("launches"), list)
        return mark if known and _RUN.fullmatch(str(mark.get("run"))) else {}

    def _write_mark(self, mark: Mapping[str, Any]) -> None:
        atomic_write(self.owner_file, json.dumps(mark, indent=1) + "\n")

    @property
    def has_run(self) -> bool:
        """Whether a run has left something here: it has made a step, or has a checkpoint."""
        return self.run is not None and (self.metrics.exists() or any(self.checkpoints.glob("step-*")))

    def check_links(self, *also: Path) -> None:
        """Raises ValueError for a folder of the run that is a link to nowhere: nothing could be saved there."""
        for folder in (self.path, self.checkpoints, self.tensorboard, *also):
            if folder.is_symlink() and not folder.is_dir():
                raise ValueError(
                    f"{folder} is a link to {folder.readlink()}, where no directory is; mount or make it, or remove "
                    "the link"
                )

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Make the directory, and keep every other run out of it.

        Yields whether others are kept out: some network file systems cannot. The kernel lets go of it with the process,
        however that ends; a directory left empty is gone afterwards. Raises ValueError while another run has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(self.path / LOCK, self.path) as locked:
                yield locked
        finally:
            with suppress(OSError):
                self.path.rmdir()

    def sweep(self, *also: Path) -> None:
        """Remove what killed processes of the run left half written. Nobody else may be writing here."""
        if self.run is not None:
            for leftover in (
                each for file in (self.owner_file, self.config, *also) for each in temporary_files_of(file)
            ):
                leftover.unlink(missing_ok=True)

    def clear(self, log_from: int | None = None) -> None:
        """Remove what the run whose directory this is has written, but for its checkpoints and the mark.

        Nothing else that may lie in the directory goes, and of a link only the link. Where `log_from` is given, the log
        loses only what is before that byte. Raises OSError for what cannot be removed: what is left of an old run would
        be taken for the new one's.
        """
        run = self.run
        if run is None:
            return
        traces = [*self.profile.glob("steps-*-rank-*"), *self.path.glob(f"{FLIGHT_RECORDER}*")]
        # The metrics last: while they are there, a start that finds the rest half removed knows that there was a run.
        for file in (*self.tensorboard.glob(f"events.*.{run}"), *traces, self.config, self.metrics):
            file.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.profile):
            if not folder.is_symlink():
                with suppress(OSError):  # it is not empty, or not there
                    folder.rmdir()
        if log_from is None:
            self.log.unlink(missing_ok=True)
        elif self.log.exists() and not self.log.is_symlink():
            rest = self.log.read_bytes()[log_from:]
            with self.log.open("r+b") as file_of_log:  # in place: it is open, to be appended to
                file_of_log.truncate(0)
                file_of_log.write(rest)

    def release(self) -> None:
        """Make the directory nobody's, after `clear`; it goes, too, if nothing else is in it."""
        self.owner_file.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()


def _has_content(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


@contextmanager
def _locked(file: Path, what: Path) -> Iterator[bool]:
    """Hold `file`, which is gone afterwards. A file, not its directory, whose lock NFS would keep to this machine."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        noted = os.pread(handle, 1000, 0).decode(errors="replace").strip()
        if noted and not noted.startswith(_NOTE):  # what a lock says is overwritten, and the file removed
            os.close(handle)
            raise ValueError(f"{file} is not a lock that a run made; move it away, or give this run another --run.name")
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
                    f"another run is writing to {what} ({noted or 'which one is not known'}); stop it, wait for "
                    "it, or give this one another --run.name",
                ) from None
            time.sleep(0.1)
            continue
        if _is_still(file, handle):
            break
        os.close(handle)  # whoever had it has removed it meanwhile
    try:
        with suppress(OSError):  # a full disk keeps no note, but the lock
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{_NOTE} {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield True
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _is_still(file: Path, handle: int) -> bool:
    """Whether the file of `handle` is the one that has this name."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
