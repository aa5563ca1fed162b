"""An elastic run of two nodes on the hosts of an emulated network, to which something happens."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared import ROOT
from benchmarks.torture.killed_run import free_port
from benchmarks.torture.nodes import kill_all
from benchmarks.torture.virtual_network import HOSTS, Network
from components.checkpoint import list_checkpoints, verify
from components.metrics.jsonl import read_rows

_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Launcher:
    """The launcher of a node, and the file with all that it and its workers print."""

    host: str
    process: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


class NetworkRun:
    """A run on two hosts, each with one process. Close it, which kills what still runs."""

    def __init__(self, recipe: Path, directory: Path, network: Network, *, settings: list[str], node_timeout: int):
        self.recipe, self.directory, self.network = recipe, directory, network
        self.launchers: list[Launcher] = []
        self.cleanup = ExitStack()
        """What `close` undoes after it has killed the processes."""
        self._settings, self._outputs = settings, directory.with_suffix(".output")
        self._outputs.mkdir()
        self._paced = self._outputs / "paced"
        self._paced.touch()
        self._environment = {
            "NNODES": "1:2", "NPROC": "1", "MASTER_PORT": str(free_port()), "NODE_TIMEOUT": str(node_timeout),
            "JOIN_AFTER": "1", "OMP_NUM_THREADS": "1", "PACE": "0.8", "PACED_WHILE": str(self._paced),
        }  # fmt: skip

    def start(self, host: str, *prefix: str, **environment: str) -> Launcher:
        """Start the launcher of a node; `prefix` is a command that runs another one."""
        command: list[Any] = [*self.network.on(host), *prefix, sys.executable, ROOT / "recipes", self.recipe]
        command += [f"--run.dir={self.directory}", *self._settings]
        output = self._outputs / f"{len(self.launchers)}-{host}.txt"
        variables = {**os.environ, **self._environment, **self.network.environment(host), **environment}
        with output.open("w") as file:
            process = subprocess.Popen(command, env=variables, stdout=file, stderr=file)
        self.launchers.append(Launcher(host, process, output))
        return self.launchers[-1]

    def start_both(self) -> tuple[Launcher, Launcher]:
        """Start the launchers of both nodes, and wait for step 4, after the first checkpoint."""
        first, second = (self.start(host) for host in HOSTS)
        self.wait_for_step(4)
        return first, second

    def close(self) -> None:
        for launcher in self.launchers:
            if launcher.process.poll() is None:
                kill_all(launcher.process.pid)
                launcher.process.wait()
        self.cleanup.close()

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.directory / "metrics.jsonl")

    def restarts(self) -> list[dict[str, Any]]:
        """Return the rows of the restarts so far."""
        return [row for row in self.rows() if "restart_processes" in row]

    def wait(self, reached: Callable[[], bool], what: str) -> None:
        """Wait until `reached` returns True. Raises AssertionError after five minutes."""
        started = time.monotonic()
        while not reached():
            assert time.monotonic() - started < _TIMEOUT_SECONDS, f"never: {what}\n{self._everything_said()}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: any(row["step"] >= step for row in self.rows()), f"step {step}")

    def wait_for_more_steps(self, count: int) -> None:
        self.wait_for_step(max((row["step"] for row in self.rows()), default=0) + count)

    def wait_until_connected(self, launcher: Launcher) -> None:
        """Wait until a launcher is connected to the rendezvous store."""
        port = f":{int(self._environment['MASTER_PORT']):04X}"
        tables = [Path(f"/proc/{launcher.process.pid}/net/{name}") for name in ("tcp", "tcp6")]

        def connected() -> bool:
            assert launcher.process.poll() is None, self._everything_said()
            lines = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
            return any(remote.endswith(port) and state == "01" for _, _, remote, state, *_ in lines)

        self.wait(connected, f"the node on {launcher.host} connects")

    def wait_for_end(self, launcher: Launcher, status: int, text: str = "") -> None:
        """Wait until a launcher ends. Raises AssertionError if its status is another, or if it has not said `text`."""
        self.wait(lambda: launcher.process.poll() is not None, f"the end of the node on {launcher.host}")
        assert launcher.process.returncode == status, f"{launcher.process.returncode}\n{self._everything_said()}"
        assert text in launcher.said(), f"not said: {text}\n{self._everything_said()}"

    def take_in_again(self, survivor: Launcher, host: str, **environment: str) -> None:
        """Start the node of `host` again, and let both finish when it has joined."""
        back = self.start(host, **environment)
        self.wait(lambda: any(row["restart_processes"] == 2 for row in self.restarts()), "it joins")
        self.finish(survivor, back)

    def finish(self, *launchers: Launcher) -> None:
        """Wait for the end of the run on these nodes, which must succeed, and check the checkpoints."""
        self._paced.unlink(missing_ok=True)
        for launcher in launchers:
            self.wait_for_end(launcher, 0)
        self.check_checkpoints()

    def check_checkpoints(self) -> None:
        """Check that every checkpoint is complete. Raises ValueError."""
        for checkpoint in list_checkpoints(self.directory / "checkpoints"):
            verify(checkpoint)

    def _everything_said(self) -> str:
        return "\n".join(f"--- {each.host}:\n{each.said()[-3000:]}" for each in self.launchers)
