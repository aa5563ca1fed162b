"""A node is lost when its heartbeat stops, whatever its clock shows."""

from __future__ import annotations

import pickle
import time
from datetime import datetime, timedelta, timezone

import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousSettings,
    RendezvousTimeout,
    _NodeDesc,
    _RendezvousState,
)

from components.distributed.heartbeat import Heartbeats
from components.distributed.membership import Membership, Patience, _StateHolder, describe_change

pytestmark = pytest.mark.quick

NODES = [_NodeDesc(f"node{number}", 1, 0) for number in range(3)]
OFFSETS = [timedelta(hours=-1), timedelta(0), timedelta(hours=1)]


class Backend:
    """A place where the state is kept, as bytes."""

    name = "memory"

    def __init__(self) -> None:
        self.state = _RendezvousState()
        self.state.participants = dict.fromkeys(NODES, 0)
        self.state.complete = True
        self.beat(NODES)

    def beat(self, nodes: list[_NodeDesc]) -> None:
        for node in nodes:
            self.state.last_heartbeats[node] = datetime.now(timezone.utc) + OFFSETS[NODES.index(node)]

    def get_state(self) -> tuple[bytes, None]:
        return pickle.dumps(self.state), None

    def set_state(self, state: bytes, token: None) -> tuple[bytes, None, bool]:
        self.state = pickle.loads(state)
        return state, None, True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_only_a_node_whose_heartbeat_stops_is_lost(clock):
    backend = Backend()
    settings = RendezvousSettings("run", 1, 3, RendezvousTimeout(), timedelta(seconds=3), 3)
    holder = _StateHolder(backend, settings, NODES[0], lost_after=15)
    for seconds, present in ((0, 3), (10, 3), (14, 3), (16, 2), (40, 2)):
        clock[0] = 1000.0 + seconds
        backend.beat(NODES[:2])
        holder.sync()
        assert len(holder.state.participants) == present, seconds
        assert set(holder.state.participants) >= set(NODES[:2]), "the clock of one of them is an hour slow"
        assert holder.state.last_heartbeats[NODES[0]] < datetime.now(timezone.utc) - timedelta(minutes=59), "as it was"


@pytest.mark.parametrize("offset", OFFSETS)
def test_nodes_wait_for_more_by_their_own_clocks(clock, offset):
    backend = Backend()
    backend.state.complete = False
    backend.state.deadline = deadline = datetime.now(timezone.utc) + offset
    timeout = RendezvousTimeout(last_call=timedelta(seconds=60))
    holder = _StateHolder(backend, RendezvousSettings("run", 1, 4, timeout, timedelta(seconds=3), 3), NODES[0], 15)
    for seconds, waits in ((0, True), (30, True), (30.5, True), (61, False)):
        clock[0] = 1000.0 + seconds
        backend.beat(NODES)
        holder.sync()
        assert (holder.state.deadline > datetime.now(timezone.utc)) == waits, seconds
        holder.mark_dirty()
        holder.sync()
        assert backend.state.deadline == deadline, "the other nodes still have what they had"
    clock[0] += 1.5
    del backend.state.participants[NODES[1]]
    backend.state.wait_list.add(NODES[1])
    holder.sync()
    assert holder.state.deadline > datetime.now(timezone.utc), "a node that waited to join is on its way"
    clock[0] += 16
    backend.beat(NODES[:1])
    holder.sync()
    assert holder.state.deadline < datetime.now(timezone.utc), "it died"
    holder.state.deadline = None
    holder.mark_dirty()
    holder.sync()
    assert holder.state.deadline is backend.state.deadline is None


@pytest.mark.parametrize(("waited", "admitted"), [(59, False), (61, True)])
def test_a_rendezvous_that_admits_a_node_waits_longer_for_it(clock, waited, admitted):
    backend = Backend()
    timeout = RendezvousTimeout(last_call=timedelta(seconds=60))
    settings = RendezvousSettings("run", 1, 4, timeout, timedelta(seconds=3), 3)
    holder = _StateHolder(backend, settings, NODES[0], lost_after=15)
    handler = DynamicRendezvousHandler(NODES[0], settings, "memory", None, holder)
    membership = Membership(handler, Patience(lost_after=15, join_after=60), watch=True)
    membership.begin()
    assert timeout.last_call == timedelta(seconds=5), "after the loss of a node"
    backend.state.wait_list.add(object())
    assert not membership.should_admit_node()
    clock[0] += waited
    backend.beat(NODES)
    assert membership.should_admit_node() == admitted
    assert timeout.last_call == timedelta(seconds=15 if admitted else 5)


def test_a_launcher_that_was_stopped_does_not_lose_itself(clock):
    backend = Backend()
    settings = RendezvousSettings("run", 1, 3, RendezvousTimeout(), timedelta(seconds=3), 3)
    holder = _StateHolder(backend, settings, NODES[2], lost_after=15)
    for seconds in (0, 600):
        clock[0] = 1000.0 + seconds
        holder.sync()
    assert list(holder.state.participants) == [NODES[2]]


@pytest.mark.parametrize(("watch", "seconds", "expected"), [(True, 16, True), (True, 14, False), (False, 16, False)])
def test_a_node_without_an_answer_has_lost_the_rendezvous_also_during_it(clock, watch, seconds, expected):
    """As in next_rendezvous of torchelastic, the state is read without Membership."""
    backend, found = Backend(), []
    settings = RendezvousSettings("run", 1, 3, RendezvousTimeout(), timedelta(seconds=3), 3)
    holder = _StateHolder(backend, settings, NODES[0], lost_after=15)
    handler = DynamicRendezvousHandler(NODES[0], settings, "memory", None, holder)
    membership = Membership(handler, Patience(lost_after=15), watch=watch)

    def answer_late() -> tuple[bytes, None]:
        clock[0] += seconds
        found.append(membership.lost_rendezvous())
        return pickle.dumps(backend.state), None

    backend.get_state = answer_late
    holder.sync()
    assert found == [expected]
    assert not membership.lost_rendezvous(), "there is an answer"


def test_a_rank_hangs_when_its_file_is_not_touched(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("POWERTRAIN_HEARTBEATS", "")  # restored afterwards
    heartbeats = Heartbeats(tmp_path / "beats", 10)
    files = [tmp_path / "beats" / str(rank) for rank in range(2)]
    assert heartbeats.hung_ranks() == [], "before the first step nothing is watched"
    for file in files:
        file.touch()
    assert heartbeats.hung_ranks() == []
    for _ in range(3):
        clock[0] += 3
        assert heartbeats.hung_ranks() == []
    files[0].write_text("x")
    clock[0] += 2
    assert heartbeats.hung_ranks() == [1]
    clock[0] += 600
    assert heartbeats.hung_ranks() == [], "the launcher itself was stopped"
    for _ in range(4):
        clock[0] += 3
        files[0].write_text("x")
        late = heartbeats.hung_ranks()
    assert late == [1]
    files[1].unlink()
    assert heartbeats.hung_ranks() == [], "its steps are done"
    heartbeats.clear()
    assert list((tmp_path / "beats").iterdir()) == []


def test_the_change_of_nodes_is_described():
    assert describe_change(["b"], ["c", "a"], 3) == "b left, a joined, c joined; nodes of the run: 3"
    assert describe_change([], [], 3) == ""


def test_how_long_nodes_wait():
    patience = Patience(lost_after=15, join_after=60)
    assert (patience.heartbeat, patience.last_call) == (3, 5)
    assert (patience.first_call, Patience(lost_after=5, join_after=0).first_call) == (60, 5)
