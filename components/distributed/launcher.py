"""Starts the worker processes of one node, watches and restarts them, and returns the exit status of the run.

torchelastic's agent does the work, in the launcher's process. Added here: signals are forwarded, and workers get the
time to save (the agent would kill them after 30 s); a run that stopped itself is not restarted; and the exit status is
that of the run.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import DistError, DistNetworkError, DistStoreError
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.numa.binding import AffinityMode, NumaOptions

from components.cpu import num_cpus
from components.distributed.collectives import NODE
from components.distributed.context import raise_descriptor_limit
from components.distributed.heartbeat import DUMPING, Heartbeats
from components.distributed.membership import (
    Membership,
    agree_on_launch,
    create_rendezvous,
    own_address,
    own_name,
    wait_for_name,
)
from components.distributed.node import RENDEZVOUS_TIMEOUT_SECONDS, NodeSpec
from components.distributed.worker import CHANGE, ELASTIC, EXIT_DIR, LAUNCH_ID, LAUNCHED_AT, connected_files
from components.interrupts import RESTART_STATUS, RESTARTING, STOPPING, is_repeated, not_ignored

_ASK_AGAIN_SECONDS = 5
"""Time after which workers that have not saved yet are asked again."""
_FINISHED = "powertrain/finished"
"""Key in the store of the current workers: the number of nodes whose workers have ended."""
_RENDEZVOUS_ATTEMPTS = 5
"""Attempts at a rendezvous if a node fails during it."""
_DUMP_SECONDS = 2
"""Time that workers get to write their stacks."""


def run_workers(command: Sequence[str], node: NodeSpec) -> int:
    """Run `command` in every process of this node until the run ends, and return its exit status.

    0: finished; 128 + n: stopped by signal n, after saving; 1 or 2: the status of a worker; 1: a worker was killed.
    """
    raise_descriptor_limit()  # every worker of the run has a connection to the first launcher
    # The launcher of the first node listens for the workers. If rank 0 did, another process could take the port that is
    # chosen for it while it starts.
    os.environ.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    for name in ("agent.server.api", "multiprocessing.api"):
        # this module reports failures itself
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel("CRITICAL")
    with tempfile.TemporaryDirectory(prefix="powertrain-") as folder:
        exit_dir = Path(folder) / "exits"
        exit_dir.mkdir()
        os.environ[EXIT_DIR] = str(exit_dir)
        os.environ[ELASTIC] = "1" if node.is_elastic else ""
        os.environ[NODE] = own_name() if node.nodes > 1 else ""
        launch, launched_at = os.environ.get(LAUNCH_ID) or uuid.uuid4().hex, time.time()
        # By default torchelastic catches all of these. A worker does not inherit "ignored" from a caught signal, so
        # SIGHUP would then end a run that was started with nohup.
        handled = [number.name for number in not_ignored((*STOPPING, signal.SIGQUIT))]
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(handled)
        try:
            run_id = node.run_id
            if node.nodes > 1:
                if (address := own_address()) is not None:
                    wait_for_name(address, RENDEZVOUS_TIMEOUT_SECONDS)
                _print_error(f"node {own_name()} waits for the others at {node.address}:{node.port}")
                wait_for_name(node.address, RENDEZVOUS_TIMEOUT_SECONDS)
            rendezvous = create_rendezvous(node.rendezvous(), node.patience)
            if node.nodes > 1:
                # a node that fails during a rendezvous leaves the others waiting for a key that it would have stored
                rendezvous._store.set_timeout(timedelta(seconds=2 * node.patience.lost_after))
                launch, launched_at = agree_on_launch(
                    node.address, node.port, run_id, launch=launch, launched_at=launched_at
                )
            os.environ[LAUNCH_ID], os.environ[LAUNCHED_AT] = launch, str(launched_at)
            watch = node.nodes > 1 and (node.is_elastic or node.max_restarts > 0)
            membership, leaves = Membership(rendezvous, node.patience, watch=watch), False
            try:
                spec = WorkerSpec(
                    role="train",
                    local_world_size=node.processes,
                    entrypoint=command[0],
                    args=tuple(command[1:]),
                    rdzv_handler=rendezvous,
                    max_restarts=node.max_restarts,
                    monitor_interval=0.1,
                    numa_options=numa_options(node.processes),
                )
                heartbeats = Heartbeats(Path(folder) / "heartbeats", node.hang_timeout_seconds)
                logs = DefaultLogsSpecs(log_dir=folder)
                agent = WorkerAgent(spec, logs, exit_dir, membership, heartbeats, is_elastic=node.is_elastic)
                status = agent.run_to_exit_status()
                leaves = agent.is_leaving
                return status
            finally:
                membership.end(leaves=leaves)
        except RendezvousClosedError:
            _print_error(
                f"the run {run_id!r} at {node.address}:{node.port} has ended; to start another one there, set "
                f"{LAUNCH_ID} to a new name, the same on all nodes"
            )
            return 1
        except RendezvousError as error:
            address = f"{node.address}:{node.port}"
            _print_error(
                f"this node, {own_name()}, could not reach, or lost contact with, the other nodes at {address}: {error}"
            )
            return 1


def numa_options(processes: int) -> NumaOptions | None:
    """Return options that bind each process to the CPUs of its GPU's NUMA node.

    Returns None if there are fewer GPUs than processes, if a scheduler has already bound this launcher to some of the
    CPUs, or if numactl, which torch needs for it, is not installed.
    """
    is_bound = num_cpus() < (os.cpu_count() or 1)
    if torch.cuda.device_count() < processes or is_bound or shutil.which("numactl") is None:
        return None
    return NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)


class WorkerAgent(LocalElasticAgent):
    """torchelastic's agent, which starts and watches the workers of this node, with the changes of this module."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: DefaultLogsSpecs,
        exit_dir: Path,
        membership: Membership,
        heartbeats: Heartbeats,
        *,
        is_elastic: bool,
    ) -> None:
        super().__init__(spec, logs)
        self._is_elastic = is_elastic
        self.is_leaving = False
        """Whether this node leaves an elastic run, which the others continue."""
        self._exit_dir, self._membership, self._heartbeats = exit_dir, membership, heartbeats
        self._signaled, self._signaled_at = 0, 0.0
        self._asked_to_restart_at: float | None = None
        threading.Thread(target=self._exit_if_rendezvous_is_lost, daemon=True).start()

    def run_to_exit_status(self) -> int:
        """Run the workers to their end, and return the exit status of the run."""
        try:
            result = self.run()
        except SignalException as error:  # a second signal, which stops the workers at once
            return 128 + int(error.sigval)
        if result is None:  # this node was a spare, and the run has ended
            return 0
        if result.state == WorkerState.UNHEALTHY:  # a node was lost or a worker hung, and no restarts are left
            return 128 + self._signaled if self._signaled else 1
        reported = [status for status, _ in self._read_reported_exits().values()]
        if not result.is_failed():  # workers that saved after a signal exited 0 and reported 128 + n
            return max(reported, default=0)
        if all(map(self._interrupted, result.failures.values())):
            return 128 + self._signaled
        # the status of a run that stopped itself, or 1 for a worker that crashed or was killed
        return max((status for status in reported if status < 128), default=1)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        for attempt in range(_RENDEZVOUS_ATTEMPTS):
            self._membership.forget_store()
            try:
                super()._rendezvous(worker_group)
                break
            except DistStoreError as error:  # another node has just failed
                _print_error("a node was lost during the rendezvous; retrying")
                if attempt == _RENDEZVOUS_ATTEMPTS - 1:
                    raise RendezvousError(str(error).splitlines()[0]) from error
            except DistNetworkError as error:
                raise RendezvousError(
                    f"{own_name()} cannot listen for workers: {str(error).splitlines()[0]}"
                ) from error

    def _exit_barrier(self) -> None:
        """Wait for the other nodes, whose workers may still be saving.

        The exit barrier of torchelastic blocks the connection to the store, which the heartbeats of this node use too:
        the others would consider this node lost.
        """
        deadline = time.monotonic() + self._exit_barrier_timeout
        store: Any = self._store
        with suppress(DistError):  # the node that hosts the store has ended
            store.add(_FINISHED, 1)
            while store.add(_FINISHED, 0) < self._worker_group.group_world_size:
                lost = self._membership.lost(is_saving=True) if self._membership.watches else []
                is_late = not self._membership.watches and time.monotonic() > deadline
                if lost or is_late or self._membership.is_closed():
                    break
                time.sleep(0.2)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._asked_to_restart_at = None
        for file in (*self._exit_dir.iterdir(), *connected_files(self._exit_dir)):  # of the workers before
            file.unlink()
        self._heartbeats.clear()
        os.environ[CHANGE] = self._membership.begin()
        started: dict[int, Any] = super()._start_workers(worker_group)
        for number in not_ignored(STOPPING):
            signal.signal(number, self._forward_signal)  # replaces the agent's handler, which kills the workers
        signal.signal(signal.SIGUSR1, self._signal_workers)
        if self._signaled:  # the signal came during a restart, so there is nothing new to save
            raise SignalException("signaled during a restart", signal.Signals(self._signaled))
        return started

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward the signal and keep watching the workers, which save and exit; a second signal stops them at once.

        SIGTERM, which a scheduler sends to a node that it takes away, stops only this node of an elastic run.
        """
        now = time.monotonic()
        if self._signaled and is_repeated(number, now - self._signaled_at):
            raise SignalException("a second signal", signal.Signals(number))
        if self._signaled:
            return
        self._signaled, self._signaled_at = number, now
        self.is_leaving = self._is_elastic and number == signal.SIGTERM
        self._signal_workers(RESTARTING if self.is_leaving else number, frame)

    def _signal_workers(self, number: int, frame: FrameType | None) -> None:
        for worker in self.get_worker_group().workers:
            if worker.id is not None:  # they are being started
                with suppress(ProcessLookupError):
                    os.kill(worker.id, number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            return self._check_membership(result)
        if result.state == WorkerState.SUCCEEDED and self._saved_to_restart():
            if self._signaled:
                raise SignalException("this node leaves", signal.Signals(self._signaled))
            self._remaining_restarts += 1  # torchelastic counts every restart, and this was no failure
            return RunResult(WorkerState.UNHEALTHY)
        if result.is_failed():
            exits = self._read_reported_exits().items()
            reported = {rank: end for rank, end in exits if end[0] < 128 and end[0] != RESTART_STATUS}
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

    def _check_membership(self, healthy: RunResult) -> RunResult:
        """Return `healthy` if running workers may continue, or else a result that restarts or ends them."""
        if self._signaled:  # the workers save and end, and nothing is started again
            self._remaining_restarts = 0
        action = "restarting from the newest checkpoint" if self._remaining_restarts else "no restarts are left"
        is_saving = self._signaled > 0 or self._asked_to_restart_at is not None
        if lost := self._membership.lost(is_saving=is_saving):
            self._kill_workers()  # they may wait for the lost node in a collective
            _print_error(f"lost contact with {', '.join(lost)}; {action}")
            return RunResult(WorkerState.UNHEALTHY)
        # Workers that are connected to the others end by themselves when those of another node do, and may have to
        # finish a save. Workers that are still connecting would wait for half an hour.
        if self._membership.has_ended() and not self._are_connected():
            self._kill_workers()
            _print_error("another node has ended the run")
            self._remaining_restarts = 0
            return RunResult(WorkerState.UNHEALTHY)
        if hung := self._heartbeats.hung_ranks():
            self._signal_workers(DUMPING, None)
            time.sleep(_DUMP_SECONDS)
            self._kill_workers()
            ranks = ", ".join(f"rank {rank}" for rank in hung)
            _print_error(
                f"no progress on {ranks} for run.hang_timeout_seconds; the stacks of the processes of this node are "
                f"above, except of those that do not run; {action}"
            )
            return RunResult(WorkerState.UNHEALTHY)
        wanted = self.is_leaving or (not self._signaled and self._membership.should_admit_node())
        now, asked_at = time.monotonic(), self._asked_to_restart_at
        # repeat the signal, because workers that are starting ignore it
        if wanted and (asked_at is None or now - asked_at > _ASK_AGAIN_SECONDS):
            self._asked_to_restart_at = now
            self._signal_workers(RESTARTING, None)
        return healthy

    def _are_connected(self) -> bool:
        return len(connected_files(self._exit_dir)) == len(self._worker_group.workers)

    def _kill_workers(self) -> None:
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGKILL)

    def _exit_if_rendezvous_is_lost(self) -> None:
        """End this launcher and its workers when the rendezvous store cannot be reached. Runs in a thread.

        A call to the store blocks until the network gives up, after a quarter of an hour. Until then the workers would
        hold their GPUs, or write into the run directory while the other nodes do.
        """
        while True:
            time.sleep(1)
            if self._membership.lost_rendezvous():
                _print_error(
                    f"this node, {own_name()}, lost contact with the others; its processes "
                    "are stopped. Start it again to rejoin the run"
                )
                self._signal_workers(signal.SIGKILL, None)
                os._exit(1)

    def _saved_to_restart(self) -> bool:
        """Return whether the workers have saved and ended, to be started again with other nodes."""
        statuses = {status for status, _ in self._read_reported_exits().values()}
        return statuses == {RESTART_STATUS}

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


def _failure_order(failure: ProcessFailure) -> tuple[bool, float]:
    """Return the sort key of a failure: killed workers, then tracebacks by time, then workers stopped by the agent."""
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
