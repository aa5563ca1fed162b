"""Starts the worker processes of one node, watches and restarts them, and returns the exit status of the run.

torchelastic's agent does the work, in the launcher's process. Added here: signals are forwarded, and workers get the
time to save (the agent would kill them after 30 s); a run that stopped itself is not restarted; and the exit status is
that of the run.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure, get_error_handler
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.numa.binding import AffinityMode, NumaOptions

from components.interrupts import STOPPING, is_repeated, not_ignored

LAUNCH_ID = "POWERTRAIN_LAUNCH"
"""Environment variable: identifier of the launch, unchanged by restarts. A scheduler that requeues jobs may set it."""
_LAUNCHED_AT = "POWERTRAIN_LAUNCHED_AT"
"""Environment variable of the workers: start time of the launcher, in seconds since the epoch."""
_EXIT_DIR = "POWERTRAIN_EXIT_DIR"
"""Environment variable of the workers: the directory to which they write their exit status."""
_RENDEZVOUS_TIMEOUT_SECONDS = 900
"""Time that the nodes of a run wait for each other: the slowest may first have to set up its environment."""


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """This node, and the address at which all nodes meet."""

    processes: int
    """Number of worker processes on this node."""
    nodes: int = 1
    rank: int = 0
    """Index of this node. Node 0 listens on `address`:`port`, and the others connect to it."""
    address: str = "127.0.0.1"
    port: int = 29500
    max_restarts: int = 0
    """Number of times that all workers are restarted after one of them failed."""

    def rendezvous(self) -> RendezvousParameters:
        """Return the rendezvous parameters: any free port for a single node, `address`:`port` for several."""
        alone = self.nodes == 1
        return RendezvousParameters(
            backend="c10d",
            endpoint="127.0.0.1:0" if alone else f"{self.address}:{self.port}",
            run_id="powertrain",  # every launch has a new store, so the id need not be unique
            min_nodes=self.nodes,
            max_nodes=self.nodes,
            local_addr="127.0.0.1" if alone else self.address if self.rank == 0 else None,
            is_host=self.rank == 0,
            join_timeout=_RENDEZVOUS_TIMEOUT_SECONDS,
            read_timeout=_RENDEZVOUS_TIMEOUT_SECONDS,
        )


def run_workers(command: Sequence[str], node: NodeSpec) -> int:
    """Run `command` in every process of this node until the run ends, and return its exit status.

    0: finished; 128 + n: stopped by signal n, after saving; 1 or 2: the status of a worker; 1: a worker was killed.
    """
    # Each restart needs a new store: in a shared one, workers would find the addresses of the previous, dead workers.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("agent.server.api", "multiprocessing.api"):
        # this module reports failures itself
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel("CRITICAL")
    with tempfile.TemporaryDirectory(prefix="powertrain-") as folder:
        exit_dir = Path(folder) / "exits"
        exit_dir.mkdir()
        os.environ[_EXIT_DIR] = str(exit_dir)
        os.environ.setdefault(LAUNCH_ID, uuid.uuid4().hex)
        os.environ[_LAUNCHED_AT] = str(time.time())
        # By default torchelastic catches all of these. A worker does not inherit "ignored" from a caught signal, so
        # SIGHUP would then end a run that was started with nohup.
        handled = [number.name for number in not_ignored((*STOPPING, signal.SIGQUIT))]
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(handled)
        try:
            rendezvous = get_rendezvous_handler(node.rendezvous())
            try:
                spec = WorkerSpec(
                    role="train",
                    local_world_size=node.processes,
                    entrypoint=command[0],
                    args=tuple(command[1:]),
                    rdzv_handler=rendezvous,
                    max_restarts=node.max_restarts,
                    monitor_interval=0.1,
                    numa_options=numa_options(
                        node.processes,
                        gpus=torch.cuda.device_count(),
                        bound_to=os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(),
                        processors=os.cpu_count() or 0,
                        numactl=shutil.which("numactl"),
                    ),
                )
                return WorkerAgent(spec, DefaultLogsSpecs(log_dir=folder), exit_dir).run_to_exit_status()
            finally:
                rendezvous.shutdown()
        except RendezvousError as error:
            address = f"{node.address}:{node.port}"
            _print_error(
                f"node {node.rank} of {node.nodes} could not reach, or lost contact with, "
                f"the other nodes at {address}: {error}"
            )
            return 1


def numa_options(
    processes: int, *, gpus: int, bound_to: set[int], processors: int, numactl: str | None
) -> NumaOptions | None:
    """Return options that bind each process to the CPUs of its GPU's NUMA node.

    Returns None if there are fewer GPUs than processes, if a scheduler has already bound this launcher to some of the
    CPUs, or if numactl, which torch needs for it, is not installed.
    """
    if gpus < processes or len(bound_to) < processors or numactl is None:
        return None
    return NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)


class WorkerAgent(LocalElasticAgent):
    """torchelastic's agent, which starts and watches the workers of this node, with the changes of this module."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, exit_dir: Path) -> None:
        super().__init__(spec, logs)
        self._exit_dir = exit_dir
        self._signaled, self._signaled_at = 0, 0.0

    def run_to_exit_status(self) -> int:
        """Run the workers to their end, and return the exit status of the run."""
        try:
            result = self.run()
        except SignalException as error:  # a second signal, which stops the workers at once
            return 128 + int(error.sigval)
        reported = [status for status, _ in self._read_reported_exits().values()]
        if not result.is_failed():  # workers that saved after a signal exited 0 and reported 128 + n
            return max(reported, default=0)
        if all(map(self._interrupted, result.failures.values())):
            return 128 + self._signaled
        # the status of a run that stopped itself, or 1 for a worker that crashed or was killed
        return max((status for status in reported if status < 128), default=1)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        for number in not_ignored(STOPPING):
            signal.signal(number, self._forward_signal)  # replaces the agent's handler, which kills the workers
        signal.signal(signal.SIGUSR1, self._signal_workers)
        if self._signaled:  # the signal came during a restart, so there is nothing new to save
            raise SignalException("signaled during a restart", signal.Signals(self._signaled))
        return started

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward the signal and keep watching the workers, which save and exit; a second signal stops them at once."""
        now = time.monotonic()
        if self._signaled and is_repeated(number, now - self._signaled_at):
            raise SignalException("a second signal", signal.Signals(number))
        if self._signaled:
            return
        self._signaled, self._signaled_at = number, now
        self._signal_workers(number, frame)

    def _signal_workers(self, number: int, frame: FrameType | None) -> None:
        for worker in self.get_worker_group().workers:
            with suppress(ProcessLookupError):
                os.kill(worker.id, number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            reported = {rank: end for rank, end in self._read_reported_exits().items() if end[0] < 128}
            # A run that stopped itself, or was asked to stop, is not restarted.
            if reported or self._signaled:
                self._remaining_restarts = 0
            if not reported:
                for rank, failure in sorted(result.failures.items(), key=lambda item: _failure_order(item[1])):
                    if not self._interrupted(failure):
                        _print_error(_describe_failure(rank, failure))
            elif 0 not in reported:  # rank 0 prints its message itself
                _print_error("\n".join({message for _, message in reported.values()}))
            if self._remaining_restarts:
                _print_error("restarting all processes from the newest checkpoint")
        return result

    def _interrupted(self, failure: ProcessFailure) -> bool:
        """Return whether a worker died of the forwarded signal, because it was not ready to save yet."""
        return self._signaled > 0 and failure.exitcode in (-self._signaled, 128 + self._signaled)

    def _read_reported_exits(self) -> dict[int, tuple[int, str]]:
        """Return rank -> (status, message) of the workers that called `report_exit`."""
        reported = {}
        for file in self._exit_dir.iterdir():
            status, _, message = file.read_text(encoding="utf-8").partition("\n")
            reported[int(file.name)] = int(status), message
        return reported


def launch_time() -> float:
    """Return when the run was launched, in seconds since the epoch; a restart of the workers does not change it."""
    return float(os.environ.get(_LAUNCHED_AT) or time.time())


def die_with_launcher() -> None:
    """Call in a worker: if the launcher is killed, this process receives a SIGTERM, saves and stops. Linux only."""
    if _EXIT_DIR in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))


def report_exit(status: int, message: str = "") -> int:
    """Call in a worker: report the exit status of the run to the launcher, and return the status to exit with.

    A worker that was stopped by a signal and has saved exits 0, because torchelastic kills the other workers on any
    other status.
    """
    if not status or _EXIT_DIR not in os.environ:
        return status
    exit_dir, rank = Path(os.environ[_EXIT_DIR]), os.environ["RANK"]
    temporary = exit_dir.parent / f"exit-{rank}"
    temporary.write_text(f"{status}\n{message}", encoding="utf-8")
    temporary.rename(exit_dir / rank)  # atomic: the launcher never reads half a file
    return 0 if status > 128 else status


def report_crash(error: BaseException) -> None:
    """Call in a worker: pass the traceback to the agent, or print it if there is no launcher."""
    if _EXIT_DIR in os.environ:
        # If the agent terminated this worker now, it would find half a file and fail to parse it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        get_error_handler().record_exception(error)
    else:
        traceback.print_exception(error)


def _failure_order(failure: ProcessFailure) -> tuple[bool, float]:
    """Return the sort key of a failure: killed workers first, then tracebacks by time, then workers stopped by the
    agent."""
    file = Path(failure.error_file)
    if file.is_file():
        return False, file.stat().st_mtime
    return failure.exitcode == -signal.SIGTERM, 0.0


def _describe_failure(rank: int, failure: ProcessFailure) -> str:
    """Return a description of the failure of one worker, with its traceback if it left one."""
    who = f"rank {rank} (process {failure.pid})"
    message: Any = failure.message
    if isinstance(message, dict):
        return f"{who} failed:\n{message['extraInfo']['py_callstack'].rstrip()}"
    if failure.exitcode == -signal.SIGTERM:
        return f"{who} was stopped because another process failed"
    if failure.exitcode < 0:
        return f"{who} was killed by {signal.Signals(-failure.exitcode).name}"
    return f"{who} exited with status {failure.exitcode}"


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
