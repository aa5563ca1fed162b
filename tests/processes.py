"""Processes of the tests: started as from a terminal, and waited for without a clock.

No test passes or fails by the time something takes: a busy machine is slow. A hang is ended by pytest's own limit.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def reset_signals() -> None:
    """Give this process the signals that a terminal gives: a shell's `&` makes it ignore SIGINT, nohup SIGHUP."""
    _default_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start_process(
    command: list[Any], before: Callable[[], object] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """`command` with the signals of a terminal, whatever this process ignores; a child inherits that.

    `before` is called in the child, after that and before the command.
    """

    def prepare() -> None:
        _default_signals()
        if before is not None:
            before()

    return subprocess.Popen(command, preexec_fn=prepare, **{"text": True, **options})


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until something has happened; fails where `process` ends before it."""
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _default_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
