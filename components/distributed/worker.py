"""The interface between a worker process and its launcher. It does not import torchelastic's agent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from components.interrupts import RESTART_STATUS, RESTARTING

LAUNCH_ID = "POWERTRAIN_LAUNCH"
"""Environment variable: identifier of the launch, unchanged by restarts. A scheduler that requeues jobs may set it."""
LAUNCHED_AT = "POWERTRAIN_LAUNCHED_AT"
"""Environment variable of the workers: start time of the launcher, in seconds since the epoch."""
EXIT_DIR = "POWERTRAIN_EXIT_DIR"
"""Environment variable of the workers: the directory to which they write their exit status."""
ELASTIC = "POWERTRAIN_ELASTIC"
"""Environment variable of the workers: not empty if the run continues when a node leaves."""
CHANGE = "POWERTRAIN_CHANGE"
"""Environment variable of the workers: the nodes that left and joined before this start."""


def launch_time() -> float:
    """Return when the run was launched, in seconds since the epoch; a restart of the workers does not change it."""
    return float(os.environ.get(LAUNCHED_AT) or time.time())


def change_of_nodes() -> str:
    """Return a line about the nodes that left and joined before this start of the workers; empty if none did."""
    return os.environ.get(CHANGE, "")


def die_with_launcher() -> None:
    """Call in a worker: if the launcher is killed, this process receives a signal, saves and stops. Linux only.

    In an elastic run the other nodes then continue without this one.
    """
    if EXIT_DIR in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        number = RESTARTING if os.environ.get(ELASTIC) else signal.SIGTERM
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))


def report_connected() -> None:
    """Call in a worker when it is connected to all others: a collective then fails when one of them dies."""
    if EXIT_DIR in os.environ:
        (Path(os.environ[EXIT_DIR]).parent / f"connected-{os.environ['RANK']}").touch()


def connected_files(exit_dir: Path) -> list[Path]:
    """Return a file for each worker of this node that has called `report_connected`."""
    return list(exit_dir.parent.glob("connected-*"))


def report_exit(status: int, message: str = "") -> int:
    """Call in a worker: report the exit status of the run to the launcher, and return the status to exit with.

    A worker that has saved after a signal exits 0: torchelastic kills the other workers on any other status.
    """
    if not status or EXIT_DIR not in os.environ:
        return status
    exit_dir, rank = Path(os.environ[EXIT_DIR]), os.environ["RANK"]
    temporary = exit_dir.parent / f"exit-{rank}"
    temporary.write_text(f"{status}\n{message}", encoding="utf-8")
    temporary.rename(exit_dir / rank)  # atomic: the launcher never reads half a file
    return 0 if status > 128 or status == RESTART_STATUS else status


def report_crash(error: BaseException) -> None:
    """Call in a worker: pass the traceback to the agent, or print it if there is no launcher."""
    if EXIT_DIR in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        # If the agent terminated this worker now, it would find half a file and fail to parse it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        get_error_handler().record_exception(error)
    else:
        traceback.print_exception(error)
