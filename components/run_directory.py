"""The run directory: where everything a run leaves behind is."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from components.durable import UNFINISHED

_PATIENCE_SECONDS = 10.0
"""How long one waits for another run to leave: what was just killed may have processes that have yet to notice."""


@dataclass(frozen=True)
class RunDirectory:
    """`config.toml`, `metrics.jsonl`, `log.txt`, `tensorboard/` and `checkpoints/` of one run."""

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
    def launch(self) -> Path:
        return self.path / ".launch"

    @property
    def stop(self) -> Path:
        """Once there is a file of this name, the run saves and stops."""
        return self.path / "stop"

    def belongs_to(self, launch: str | None) -> bool:
        """Whether `launch`, the name of a start of processes, has made this directory its own before."""
        return launch is not None and self.launch.is_file() and self.launch.read_text(encoding="utf-8") == launch

    def remember(self, launch: str) -> None:
        """Make the directory that of `launch`."""
        self.launch.write_text(launch, encoding="utf-8")

    @property
    def used(self) -> bool:
        """Whether a run has left something here."""
        return self.metrics.exists() or self.checkpoints.exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the directory, keep every other run out of it, and sweep up after those that were killed.

        The kernel lets go of it with the process, however that ends; one left empty is gone afterwards.
        Raises ValueError while another run has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            if _lock(handle, self.path):
                for leftover in self.path.glob(UNFINISHED):
                    leftover.unlink(missing_ok=True)
            yield
        finally:
            os.close(handle)
            with suppress(OSError):
                self.path.rmdir()

    def clear(self) -> None:
        """Remove what a run leaves behind, and nothing else that may lie in the directory."""
        for file in (self.config, self.metrics, self.log, self.stop):
            file.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)


def _lock(handle: int, path: Path) -> bool:
    """Whether this process alone has it now; some network file systems cannot lock, and there nobody is kept out."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return False
        if time.monotonic() > deadline:
            raise ValueError(
                f"name: another run is writing to {path}; stop it, wait for it, or give this one another --run.name"
            )
        time.sleep(0.1)
