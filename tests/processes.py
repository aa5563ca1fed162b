"""Processes of the tests: started as from a terminal, and awaited without timeouts.

No test passes or fails by the time something takes: a busy machine is slow. A hang is ended by pytest's own limit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fork_server import ROOT, ForkedPython, is_python

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def reset_signals() -> None:
    """Restore the signal handlers of a terminal: a shell's `&` makes a process ignore SIGINT, nohup SIGHUP."""
    _default_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start_process(
    command: list[Any], ignored: tuple[signal.Signals, ...] = (), **options: Any
) -> subprocess.Popen[str]:
    """Start `command` with the signals of a terminal, whatever this process ignores; a child inherits that.

    Of those signals it ignores `ignored`. A command for this interpreter is forked from a process that has imported
    torch already.
    """
    if sys.platform == "linux" and is_python(command):
        return ForkedPython(command, ignored=ignored, **{"text": True, **options})
    options.pop("hash_seed", None)

    def prepare() -> None:
        _default_signals()
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    return subprocess.Popen(command, preexec_fn=prepare, **{"text": True, **options})


def run_process(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Start `command` as `start_process` does, wait for its end, and return its status and output."""
    process = start_process(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
    said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *said)


def run_ranks(count: int, command: list[Any], folder: Path) -> None:
    """Run `command` in `count` processes, as torchrun does; when one fails the others are killed, and so does this.

    The environment variable RENDEZVOUS names the file of their rendezvous. What they write is kept in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RENDEZVOUS": f"file://{folder / 'rendezvous'}"}
    ranks, logs = [], [folder / f"rank-{rank}.log" for rank in range(count)]
    try:
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with log.open("w") as output:
                ranks.append(
                    start_process(
                        command,
                        env={**os.environ, **world, **place},
                        cwd=ROOT,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        hash_seed=rank % 2,
                    )
                )
        while None in (statuses := [rank.poll() for rank in ranks]) and not any(statuses):
            time.sleep(0.02)
        failed = [rank for rank, status in enumerate(statuses) if status]
        assert not failed, f"rank {failed[0]}: status {statuses[failed[0]]}: {logs[failed[0]].read_text()[-6000:]}"
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()


def call_in_ranks(function: Callable[..., None], folder: Path, count: int) -> None:
    """Call `function(rank, folder)`, of a module, in `count` processes."""
    call = f"import os; from {function.__module__} import {function.__name__} as call; "
    call += f"from pathlib import Path; call(int(os.environ['RANK']), Path({str(folder)!r}))"
    run_ranks(count, [sys.executable, "-c", call], folder / "ranks")


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds; fail if `process` ends before."""
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _default_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
