"""The nodes of a run, according to the rendezvous of torchelastic.

A node without heartbeats is removed from the rendezvous by the others. torchelastic itself only notices when a worker
fails, which a lost network connection may delay until a collective times out; here the launcher of every node compares
the nodes of the rendezvous with those of the last start. The classes of torchelastic used here are not public: its
interface has neither the nodes nor their heartbeats.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousSettings,
    _BackendRendezvousStateHolder,
    _RendezvousExitOp,
    create_handler,
)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the nodes wait for each other, in seconds."""

    lost_after: float = 15
    """Time without a heartbeat after which a node counts as lost."""
    join_after: float = 60
    """Time that a new node waits before the others save and restart with it."""

    @property
    def heartbeat(self) -> int:
        """Time between the heartbeats of a node."""
        return max(1, int(self.lost_after / 5))

    @property
    def first_call(self) -> int:
        """Time that the first rendezvous waits for more nodes than the smallest number."""
        return max(1, int(self.join_after), int(self.lost_after))

    @property
    def last_call(self) -> int:
        """Time that the rendezvous after the loss of a node waits for more nodes than the smallest number."""
        return max(1, int(self.lost_after / 3))


def create_rendezvous(parameters: RendezvousParameters, patience: Patience) -> DynamicRendezvousHandler:
    """Return torchelastic's handler, with a node lost when its heartbeat no longer changes.

    torchelastic compares timestamps of other nodes with the clock of this one: a node whose clock is slow would be lost
    at once, and the rendezvous would wait too short or too long for more nodes.
    """
    backend, store = create_backend(parameters)
    handler = create_handler(store, backend, parameters)
    node = handler._this_node
    holder = _StateHolder(backend, handler.settings, node, patience.lost_after)
    return DynamicRendezvousHandler(node, handler.settings, backend.name, store, holder)


class _StateHolder(_BackendRendezvousStateHolder):
    """The state of the rendezvous, as this node sees it."""

    def __init__(
        self, backend: RendezvousBackend, settings: RendezvousSettings, own_node: Any, lost_after: float
    ) -> None:
        super().__init__(backend, settings)
        self._own_node, self._lost_after = own_node, lost_after
        self._seen: dict[Any, tuple[datetime, float]] = {}
        """Node -> its latest heartbeat, and when this node first read it."""
        self.asked_at: float | None = None
        """Start of the pending request for the rendezvous state; None if there is none."""
        self._deadline: datetime | None = None
        """When the rendezvous stops waiting for more nodes, by the clock of the node that set it."""
        self._deadline_seen_at = 0.0
        self._own_deadline: datetime | None = None
        """The same by the clock of this node, with which torchelastic compares it."""

    def sync(self) -> bool | None:
        if self._state.deadline is not None and self._state.deadline == self._own_deadline:
            self._state.deadline = self._deadline  # the other nodes keep the deadline that they have
        self.asked_at = time.monotonic()
        try:
            changed: bool | None = super().sync()
        finally:
            self.asked_at = None
        if self._state.deadline is not None:
            if self._state.deadline != self._deadline:
                self._deadline, self._deadline_seen_at = self._state.deadline, time.monotonic()
            passed = timedelta(seconds=time.monotonic() - self._deadline_seen_at)
            left = self._settings.timeout.last_call - passed
            if self._state.wait_list:  # these nodes are about to take part, or are dead and soon removed
                left = max(left, timedelta(seconds=1))
            self._own_deadline = self._state.deadline = datetime.now(timezone.utc) + left
        return changed

    def _sanitize(self) -> None:
        heartbeats, now = self._state.last_heartbeats, time.monotonic()
        for node, heartbeat in heartbeats.items():
            if node not in self._seen or self._seen[node][0] != heartbeat:
                self._seen[node] = heartbeat, now
        alive = {node for node in heartbeats if now - self._seen[node][1] <= self._lost_after}
        alive.add(self._own_node)  # also after this process was stopped, as by Ctrl-Z; the others may have removed it
        # torchelastic removes the nodes with old heartbeats
        self._state.last_heartbeats = {node: _NEW if node in alive else _OLD for node in heartbeats}
        super()._sanitize()
        self._state.last_heartbeats = {node: heartbeats[node] for node in self._state.last_heartbeats}


_NEW, _OLD = (limit.replace(tzinfo=timezone.utc) for limit in (datetime.max, datetime.min))


class Membership:
    """The nodes of the run, as one launcher sees them, and those that left or want to join."""

    def __init__(self, rendezvous: DynamicRendezvousHandler, patience: Patience, *, watch: bool) -> None:
        """Without `watch` no node is ever lost or admitted: the run could not continue."""
        self._rendezvous, self._patience, self.watches = rendezvous, patience, watch
        self._missing_since: float | None = None
        self._closed_since: float | None = None
        self._nodes: frozenset[str] = frozenset()
        self._waiting_since: float | None = None
        # this class decides when a waiting node is admitted; torchelastic would kill the workers at once
        rendezvous.num_nodes_waiting = lambda: 0  # type: ignore[method-assign]

    def begin(self) -> str:
        """Call after a rendezvous: record its nodes, and return which left and joined since the last one."""
        before, self._nodes = self._nodes, self._participants()
        self._waiting_since = self._missing_since = None
        self._wait_for_more(self._patience.last_call)
        if not before:
            return ""
        return describe_change(before - self._nodes, self._nodes - before, len(self._nodes))

    def forget_store(self) -> None:
        """Call before a rendezvous: the store of the previous workers still lists dead ones."""
        self._rendezvous._bootstrap_store_info = self._rendezvous._shared_tcp_store_server = None

    def is_closed(self) -> bool:
        """Return whether a node has ended the run, as of the last heartbeat of this node."""
        return bool(self._rendezvous._state_holder.state.closed)

    def has_ended(self) -> bool:
        """Return whether a node ended the run so long ago that workers here wait for workers that will not come."""
        if not self.is_closed():
            self._closed_since = None
            return False
        if self._closed_since is None:
            self._closed_since = time.monotonic()
        return time.monotonic() - self._closed_since > self._patience.lost_after

    def lost(self, *, is_saving: bool) -> list[str]:
        """Return the nodes that cannot be reached, and those that wait for the next rendezvous because their workers
        failed: workers here may then wait for them in a collective. Call often.

        With `is_saving`, workers save and end by themselves, and a node whose workers are faster waits for this one.
        """
        state = self._sync() if self.watches else None
        # a closed rendezvous is that of a run that ends, whose workers may still be saving
        if state is None or state.closed or not (missing := self._nodes - self._participants()):
            self._missing_since = None
            return []
        if self._missing_since is None:
            self._missing_since = time.monotonic()
        waits = {_name(node) for node in state.wait_list}
        gone = missing - waits
        patience = self._patience.heartbeat if gone else self._patience.lost_after
        if time.monotonic() - self._missing_since < patience or (is_saving and not gone):
            return []
        return sorted(missing)

    def lost_rendezvous(self) -> bool:
        """Return whether the rendezvous store has not answered for so long that the others continue without this node.

        May be called from another thread while the request is pending, also during a rendezvous.
        """
        holder: Any = self._rendezvous._state_holder
        asked_at = holder.asked_at if self.watches else None
        return asked_at is not None and time.monotonic() - asked_at > self._patience.lost_after

    def should_admit_node(self) -> bool:
        """Return whether a node has waited long enough for a restart that admits it. Call often."""
        state = self._sync() if self.watches else None
        if state is None or not state.wait_list or len(state.participants) >= self._rendezvous.settings.max_nodes:
            self._waiting_since = None
            return False
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        if time.monotonic() - self._waiting_since < self._patience.join_after:
            return False
        self._wait_for_more(self._patience.lost_after)  # the next rendezvous waits for it
        return True

    def end(self, *, leaves: bool) -> None:
        """Call at the end of the launcher. The run of the others ends too, unless this node `leaves` or is a spare."""
        rendezvous = self._rendezvous
        rendezvous._stop_heartbeats()
        if rendezvous._this_node not in rendezvous._state_holder.state.participants:
            return
        if leaves:
            with suppress(RendezvousError):
                deadline = time.monotonic() + self._patience.lost_after
                rendezvous._op_executor.run(_RendezvousExitOp(), deadline)
        else:
            rendezvous.shutdown()

    def _wait_for_more(self, seconds: float) -> None:
        """Set how long the next rendezvous, once it has the smallest number of nodes, waits for more."""
        self._rendezvous.settings.timeout._set_timeouts(last_call=timedelta(seconds=seconds))

    def _sync(self) -> Any:
        # torchelastic has no public access to the nodes; its own num_nodes_waiting is this, with the length of a list
        with self._rendezvous._heartbeat_lock:
            self._rendezvous._state_holder.sync()
        return self._rendezvous._state_holder.state

    def _participants(self) -> frozenset[str]:
        state = self._rendezvous._state_holder.state
        return frozenset(map(_name, state.participants))


def _name(node: Any) -> str:
    return f"{node.addr} (process {node.pid})"


def describe_change(left: Iterable[str], joined: Iterable[str], nodes: int) -> str:
    """Return a line about the nodes that left and joined; empty if none did."""
    parts = [f"{node} left" for node in sorted(left)] + [f"{node} joined" for node in sorted(joined)]
    return f"{', '.join(parts)}; nodes of the run: {nodes}" if parts else ""


def agree_on_launch(address: str, port: int, run_id: str, *, launch: str, launched_at: float) -> tuple[str, float]:
    """Return the identifier and the start time of the launch, the same on all nodes: those of the first one.

    They are kept in the rendezvous store, so that a node that joins later, or replaces a lost one, has them too.
    Raises RendezvousError if the store has another value under this key.
    """
    store = TCPStore(address, port, is_master=False)
    key = f"powertrain/launch/{run_id}"
    found = store.compare_set(key, "", json.dumps([launch, launched_at]))
    try:
        return parse_launch(found)
    except ValueError:
        raise RendezvousError(f"{key} is {found[:60]!r}, which no launcher has written") from None


def parse_launch(stored: bytes) -> tuple[str, float]:
    """Return identifier and start time of a launch as `agree_on_launch` stores them. Raises ValueError otherwise."""
    try:
        launch, launched_at = json.loads(stored)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(launch, str) or not isinstance(launched_at, float):
        raise ValueError(f"{launch!r} and {launched_at!r} are not a name and a time")
    return launch, launched_at


def own_address() -> str | None:
    """Return the address at which other nodes reach this one, from NODE_ADDR; None: that of its host name."""
    return os.environ.get("NODE_ADDR") or None


def own_name() -> str:
    """Return the name of this node in messages and logs."""
    return own_address() or socket.gethostname()


def wait_for_name(host: str, timeout_seconds: float) -> None:
    """Wait until a host name resolves, which a cluster may create later. Raises RendezvousError."""
    deadline, said = time.monotonic() + timeout_seconds, False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(f"the host name {host} does not resolve: {error}") from None
            if not said:
                print(f"the host name {host} does not resolve yet: {error}", file=sys.stderr, flush=True)
            said = True
            time.sleep(2)
