"""The run directory: where everything a run leaves behind is."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from components.durable import UNFINISHED

LOCK = ".lock"
FLIGHT_RECORDER = "nccl_trace_rank_"
"""Beginning of the names, before the rank, of what NCCL's flight recorder writes when a collective times out."""
_PATIENCE_SECONDS = 10.0
"""How long one waits for another run to leave: what was just killed may have processes that have yet to notice."""


@dataclass(frozen=True)
class RunDirectory:
    """`config.toml`, `metrics.jsonl`, `log.txt`, `tensorboard/`, `checkpoints/` and `profile/` of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def launch(self) -> Path:
        return self.path / ".launch"

    @property
    def stop(self) -> Path:
        """Once there is a file of this name, the run saves and stops."""
        return self.path / "stop"

    def belongs_to(self, launch: str | None) -> bool:
        """Whether `launch`, the name of a start of processes, has made this directory its own before."""
        if launch is None or not self.launch.is_file():
            return False
        return launch in self.launch.read_text(encoding="utf-8").split("\n")

    def remember(self, launches: Iterable[str]) -> None:
        """Make the directory that of `launches`: each node has its own, and any may be the one that is left."""
        self.launch.write_text("\n".join(dict.fromkeys(launches)), encoding="utf-8")

    @property
    def used(self) -> bool:
        """Whether a run has left something here."""
        return self.metrics.exists() or self.checkpoints.exists()

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Make the directory, keep every other run out of it, and sweep up after those that were killed.

        Yields whether others are kept out: some network file systems cannot. The kernel lets go of it with the process,
        however that ends; a directory left empty is gone afterwards. Raises ValueError while another run has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(self.path / LOCK, self.path) as locked:
                if locked:
                    for leftover in self.path.glob(UNFINISHED):
                        leftover.unlink(missing_ok=True)
                yield locked
        finally:
            with suppress(OSError):
                self.path.rmdir()

    def clear(self, log_from: int | None = None) -> None:
        """Remove what a run leaves behind, and nothing else that may lie in the directory.

        Where `log_from` is given, the log loses only what is before that byte. Raises OSError for what cannot be
        removed: what is left of an old run would be taken for the new one's.
        """
        for file in (self.config, self.metrics, *self.path.glob(f"{FLIGHT_RECORDER}*")):
            file.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.checkpoints, self.profile):
            _empty(folder)
        if log_from is None:
            self.log.unlink(missing_ok=True)
        elif self.log.exists():
            rest = self.log.read_bytes()[log_from:]
            with self.log.open("r+b") as file_of_log:  # in place: it is open, to be appended to
                file_of_log.truncate(0)
                file_of_log.write(rest)


def _empty(folder: Path) -> None:
    """Remove a folder; one that is elsewhere, behind a link, loses its content and stays."""
    if folder.is_symlink():
        for inside in folder.iterdir():
            _empty(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _locked(file: Path, what: Path) -> Iterator[bool]:
    """Hold `file`, which is gone afterwards. A file, not its directory, whose lock NFS would keep to this machine."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 1000, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                file.unlink(missing_ok=True)
                yield False
                return
            if time.monotonic() > deadline:
                raise ValueError(
                    f"name: another run is writing to {what} ({holder or 'which one is not known'}); stop it, wait for "
                    "it, or give this one another --run.name"
                ) from None
            time.sleep(0.1)
            continue
        if _is_still(file, handle):
            break
        os.close(handle)  # whoever had it has removed it meanwhile
    try:
        with suppress(OSError):  # a full disk keeps no note, but the lock
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
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
