"""A run that is killed at random instants and restarted until it ends."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.torture.kinds import VALIDATION, VALIDATION_STEPS, Kind, remote_folder
from components.checkpoint import list_checkpoints
from components.checkpoint.manifest import MANIFEST
from components.metrics.jsonl import last_rows
from recipes import cli

_TIMEOUT_SECONDS = 300.0
_ORPHAN_TIMEOUT_SECONDS = 2.0
"""Timeout of a process whose peer was killed: before they have connected, it would wait for half an hour."""
_TERMINATED = 128 + signal.SIGTERM
"""Exit status of a run that has saved and stopped after SIGTERM."""
_FIRST_PORT, _PORTS = 20_000, 12_768
"""Ports below those that Linux gives to outgoing connections, and to programs that ask for any: 32768 and more."""


@dataclass(frozen=True)
class Pace:
    """How long an uninterrupted run takes, to choose instants in it."""

    start_seconds: float = 0.5
    """Until the first row of metrics."""
    run_seconds: float = 2.0
    """From then to the end."""


@dataclass
class Life:
    """What happened to a run: how often it was killed or stopped, by the moment."""

    killed: Counter[str] = field(default_factory=Counter)
    """SIGKILL, by the moment."""
    stopped: int = 0
    """SIGTERM, after which it saved and stopped."""
    lost: int = 0
    """Removals of the run directory."""


class KilledRun:
    """A run in `directory` that is started again and again.

    Its processes are forked from this one, which has imported everything and computed nothing, so they start quickly.
    """

    def __init__(self, recipe: Path, directory: Path, kind: Kind, rng: random.Random, pace: Pace | None = None) -> None:
        self.recipe, self.directory, self.kind, self.rng = recipe, directory, kind, rng
        self.pace = pace or Pace()
        self.remote = remote_folder(recipe.parent) / directory.name
        self.children: list[int] = []
        self.began_with, self.began_at = "start", 0.0
        """How the last start began, and when."""
        self.life = Life()

    def finish(self, kills: int) -> None:
        """Kill the run up to `kills` times, then let it finish. Raises AssertionError if it fails."""
        while self.life.killed.total() < kills:
            self._start(self.rng.choice(self.kind.ranks))
            moment = self._wait_for(self.rng.choice(self._moments()))
            signals = (signal.SIGTERM, signal.SIGKILL) if moment == "stop" else (signal.SIGKILL,)
            statuses = self._end(*signals)
            if min(statuses) < 0:
                self.life.killed[moment] += 1
            elif max(statuses) == _TERMINATED:
                self.life.stopped += 1
            else:
                self._require_success(statuses)
                return
            if self.kind.remote and self.rng.random() < 0.5:
                shutil.rmtree(self.directory, ignore_errors=True)
                self.life.lost += 1
        self._start(self.rng.choice(self.kind.ranks))
        self._require_success(self._wait(_TIMEOUT_SECONDS))

    def measure(self) -> Pace:
        """Let the run finish without a kill, and return how long it took."""
        metrics, started = self.directory / "metrics.jsonl", time.monotonic()
        self._start(self.kind.ranks[0])
        self._poll(lambda: _size(metrics) > 0, _TIMEOUT_SECONDS)
        first = time.monotonic()
        self._require_success(self._wait(_TIMEOUT_SECONDS))
        return Pace(first - started, time.monotonic() - first)

    def _start(self, ranks: int) -> None:
        """Start the run on `ranks` processes, from its newest checkpoint if there is one."""
        self.began_with, self.began_at = "start", time.time()
        if list_checkpoints(self.directory / "checkpoints"):
            self.began_with = "resume"
        elif any(self.remote.glob(f"checkpoints/step-*/{MANIFEST}")):
            self.began_with = "download"
        arguments = [str(self.recipe), f"--run.dir={self.directory}"]
        arguments += ["--run.if_exists=replace"] if self.began_with == "start" else ["--resume"]
        environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.children = [
            _fork(arguments, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}, self.log)
            for rank in range(ranks)
        ]

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")

    def _moments(self) -> list[str]:
        # a start is rarer than a resume, and a download too
        moments = ["start"] * (1 if self.began_with == "resume" else 4) + ["any time", "save", "metrics", "stop"]
        moments += ["upload"] * 3 * self.kind.remote + ["validation"] * (VALIDATION in self.kind.settings)
        return moments

    def _wait_for(self, wanted: str) -> str:
        """Wait for a moment and return its name, which is "any time" if that moment did not come."""
        if wanted == "start":
            self._poll(lambda: False, self.rng.uniform(0, self.pace.start_seconds))
            return self.began_with
        latest = self.pace.start_seconds + self.pace.run_seconds / 5
        self._poll(lambda: False, self.rng.uniform(0.5 * self.pace.start_seconds, latest))
        if wanted in ("any time", "stop"):
            return wanted
        metrics = self.directory / "metrics.jsonl"
        before = _size(metrics)
        reached = {
            "save": lambda: any(map(self._is_recent, (self.directory / "checkpoints").glob(".*"))),
            "metrics": lambda: _size(metrics) > before,
            "upload": self._is_uploading,
            "validation": self._is_validating,
        }
        if not self._poll(reached[wanted], latest):
            return "any time"
        if wanted != "metrics":
            time.sleep(self.rng.uniform(0, 0.03))
        return wanted

    def _is_recent(self, path: Path) -> bool:
        """Return whether a directory has changed since the last start; what an earlier one left has not."""
        try:
            return path.stat().st_mtime > self.began_at
        except FileNotFoundError:
            return False

    def _is_uploading(self) -> bool:
        """Return whether a remote checkpoint is incomplete: it is uploaded, or removed."""
        steps = self.remote.glob("checkpoints/step-*")
        return any(self._is_recent(step) and not (step / MANIFEST).exists() for step in steps)

    def _is_validating(self) -> bool:
        """Return whether the last row is that of a step after which a validation is due."""
        try:
            rows = last_rows(self.directory / "metrics.jsonl")
        except FileNotFoundError:
            return False
        return bool(rows) and rows[-1]["step"] % VALIDATION_STEPS == 0 and "val_loss" not in rows[-1]

    def _poll(self, reached: Callable[[], bool], seconds: float) -> bool:
        """Wait until `reached`, the end of the first process, or for some seconds; return whether it was reached."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not _has_ended(self.children[0]):
            if reached():
                return True
            time.sleep(0.0005)
        return False

    def _end(self, *signals: signal.Signals) -> list[int]:
        """Send signals to all processes, as if the machine failed, or to one; return the statuses of all."""
        victims = self.children if self.rng.random() < 0.5 else [self.rng.choice(self.children)]
        for number in signals:
            for child in victims:
                os.kill(child, number)  # a process that has ended stays until `_wait`
            if number == signal.SIGTERM:
                # the grace period of a scheduler, which half of the time suffices
                grace = self.rng.choice((self.rng.uniform(0, 0.2), _TIMEOUT_SECONDS))
                self._poll(lambda: any(map(_has_ended, victims)), grace)
        return self._wait(_ORPHAN_TIMEOUT_SECONDS)

    def _wait(self, seconds: float) -> list[int]:
        """Return the exit statuses, negative for a signal; processes that have not ended in time are killed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(map(_has_ended, self.children)):
            time.sleep(0.002)
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]

    def _require_success(self, statuses: list[int]) -> None:
        assert set(statuses) == {0}, f"statuses {statuses}; see {self.log}"


def _fork(arguments: list[str], environment: dict[str, str], log: Path) -> int:
    """Start a run in a forked process, and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        status = cli.main(arguments)
    finally:
        os._exit(status)


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def free_port() -> int:
    """Return a port of this machine that is free now. No program gets it by asking for any free one."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", _FIRST_PORT + secrets.randbelow(_PORTS)))
            return int(probe.getsockname()[1])
