"""The processes of one node: started together, watched, started again, and accounted for when they end.

torchelastic's agent does the work, in the launcher's own process. What is added here: a signal is passed on and the
workers are given the time to save (the agent would kill them after 30 s), a restart does not follow an end that the
run itself decided on, and the exit status is that of the run.
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
"""Environment variable: one value per launch, the same after a restart. A scheduler that requeues may set it."""
_LAUNCHED_AT = "POWERTRAIN_LAUNCHED_AT"
"""Environment variable of the workers: when the launcher began, in seconds since the epoch."""
_EXIT_DIR = "POWERTRAIN_ENDS"
"""Environment variable of the workers: a folder in which they leave the status they end with."""
_PATIENCE_SECONDS = 900
"""How long the nodes of a run wait for each other: the slowest may first have to set up its environment."""


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """This node, and how it finds the others."""

    processes: int
    """Worker processes on this node."""
    nodes: int = 1
    rank: int = 0
    """Node 0 is where the others meet: it listens on `address`:`port`."""
    address: str = "127.0.0.1"
    port: int = 29500
    max_restarts: int = 0
    """How often all workers are started again after one of them failed."""

    def rendezvous(self) -> RendezvousParameters:
        """The workers of one node meet on any free port, those of several on the one given."""
        alone = self.nodes == 1
        return RendezvousParameters(
            backend="c10d",
            endpoint="127.0.0.1:0" if alone else f"{self.address}:{self.port}",
            run_id="powertrain",  # the store is new with every launch: no other run can be met there
            min_nodes=self.nodes,
            max_nodes=self.nodes,
            local_addr="127.0.0.1" if alone else self.address if self.rank == 0 else None,
            is_host=self.rank == 0,
            join_timeout=_PATIENCE_SECONDS,
            read_timeout=_PATIENCE_SECONDS,
        )


def run_workers(command: Sequence[str], node: NodeSpec) -> int:
    """Run `command` in every process of this node until the run ends; returns its exit status.

    0: done; 128 + signal: stopped by one, after saving; 2 and 1 as a worker ended; 1 too when one was killed.
    """
    # Each attempt needs a store of its own: in a shared one a worker finds the addresses its dead predecessors left.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel("CRITICAL")  # what they warn of is said here
    with tempfile.TemporaryDirectory(prefix="powertrain-") as folder:
        ends = Path(folder) / "ends"
        ends.mkdir()
        os.environ[_EXIT_DIR] = str(ends)
        os.environ.setdefault(LAUNCH_ID, uuid.uuid4().hex)
        os.environ[_LAUNCHED_AT] = str(time.time())
        # torchelastic would catch all of them, and a worker does not inherit that a caught signal was ignored before:
        # SIGHUP would end a run that was started with nohup.
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
                return WorkerAgent(spec, DefaultLogsSpecs(log_dir=folder), ends).status()
            finally:
                rendezvous.shutdown()
        except RendezvousError as error:
            meeting = f"{node.address}:{node.port}"
            _say(f"node {node.rank} of {node.nodes} lost or never met the others at {meeting}: {error}")
            return 1


def numa_options(
    processes: int, *, gpus: int, bound_to: set[int], processors: int, numactl: str | None
) -> NumaOptions | None:
    """Bind each process to the processors of its GPU's NUMA node, whose memory is the nearest.

    None where each process does not have a GPU, where a scheduler has bound this launcher to some processors already,
    and where there is no numactl, which torch starts the processes with.
    """
    if gpus < processes or len(bound_to) < processors or numactl is None:
        return None
    return NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)


class WorkerAgent(LocalElasticAgent):
    """Watches the workers of this node."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, ends: Path) -> None:
        super().__init__(spec, logs)
        self._ends = ends
        self._signalled, self._signalled_at = 0, 0.0

    def status(self) -> int:
        """Run the workers to their end; returns the exit status of the run."""
        try:
            result = self.run()
        except SignalException as second:  # they were told to hurry
            return 128 + int(second.sigval)
        chosen = [status for status, _ in self._read_ends().values()]
        if not result.is_failed():
            return max(chosen, default=0)
        if all(map(self._interrupted, result.failures.values())):
            return 128 + self._signalled
        return max((status for status in chosen if status < 128), default=1)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        for number in not_ignored(STOPPING):
            signal.signal(number, self._pass_on)  # in place of the agent's own, which stops the workers itself
        signal.signal(signal.SIGUSR1, self._tell_workers)
        if self._signalled:  # while they were being started again: there is nothing new to save
            raise SignalException("signalled during a restart", signal.Signals(self._signalled))
        return started

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Tell the workers, and go on watching them; a second request stops them."""
        now = time.monotonic()
        if self._signalled and is_repeated(number, now - self._signalled_at):
            raise SignalException("a second signal", signal.Signals(number))
        if self._signalled:
            return
        self._signalled, self._signalled_at = number, now
        self._tell_workers(number, frame)

    def _tell_workers(self, number: int, frame: FrameType | None) -> None:
        for worker in self.get_worker_group().workers:
            with suppress(ProcessLookupError):
                os.kill(worker.id, number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            ends = {rank: end for rank, end in self._read_ends().items() if end[0] < 128}
            if ends or self._signalled:
                self._remaining_restarts = 0
            if not ends:
                for rank, failure in sorted(result.failures.items(), key=lambda item: _when(item[1])):
                    if not self._interrupted(failure):
                        _say(_describe_failure(rank, failure))
            elif 0 not in ends:  # rank 0 has said itself what the others find, too
                _say("\n".join({message for _, message in ends.values()}))
            if self._remaining_restarts:
                _say("starting all processes again, from the newest checkpoint")
        return result

    def _interrupted(self, failure: ProcessFailure) -> bool:
        """Whether a worker ended because a signal came before it was ready to save."""
        return self._signalled > 0 and failure.exitcode in (-self._signalled, 128 + self._signalled)

    def _read_ends(self) -> dict[int, tuple[int, str]]:
        """(status, message) of each rank that `end` was called in."""
        ends = {}
        for file in self._ends.iterdir():
            status, _, message = file.read_text(encoding="utf-8").partition("\n")
            ends[int(file.name)] = int(status), message
        return ends


def launch_time() -> float:
    """When the run was launched, in seconds since the epoch: a restart of its processes does not count."""
    return float(os.environ.get(_LAUNCHED_AT) or time.time())


def die_with_launcher() -> None:
    """In a worker: should the launcher be killed outright, save and stop as on a SIGTERM. Linux only."""
    if _EXIT_DIR in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))


def report_exit(status: int, message: str = "") -> int:
    """In a worker: note the status that the run itself chose, and why; returns the status to exit with.

    A run that was stopped has saved and ends well: with 0, for with anything else the first worker to get there would
    have the others killed.
    """
    if not status or _EXIT_DIR not in os.environ:
        return status
    folder, rank = Path(os.environ[_EXIT_DIR]), os.environ["RANK"]
    written = folder.parent / f"end-{rank}"
    written.write_text(f"{status}\n{message}", encoding="utf-8")
    written.rename(folder / rank)
    return 0 if status > 128 else status


def report_crash(error: BaseException) -> None:
    """In a worker: leave the traceback where the agent finds it, or print it where there is none."""
    if _EXIT_DIR in os.environ:
        # The agent, stopping this worker because of another, would find half a file and fail over it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        get_error_handler().record_exception(error)
    else:
        traceback.print_exception(error)


def _when(failure: ProcessFailure) -> tuple[bool, float]:
    """What failed first comes first: who was killed, who left a traceback, in time, and who was only stopped then."""
    file = Path(failure.error_file)
    if file.is_file():
        return False, file.stat().st_mtime
    return failure.exitcode == -signal.SIGTERM, 0.0


def _describe_failure(rank: int, failure: ProcessFailure) -> str:
    """What happened to one worker, with its traceback if it left one."""
    who = f"rank {rank} (process {failure.pid})"
    message: Any = failure.message
    if isinstance(message, dict):
        return f"{who} failed:\n{message['extraInfo']['py_callstack'].rstrip()}"
    if failure.exitcode == -signal.SIGTERM:
        return f"{who} was stopped because of that"
    if failure.exitcode < 0:
        return f"{who} was killed by {signal.Signals(-failure.exitcode).name}"
    return f"{who} ended with status {failure.exitcode}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
