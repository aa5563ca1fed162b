"""Two launchers that connect form one run."""

from __future__ import annotations

import socket

import pytest

from tests.distributed.launching import SHORT, final_loss, finish, start, steps
from tools import prepare_data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_nodes_train_as_one_also_after_a_failure_on_one_of_them(new_tiny):
    alone, together = new_tiny("alone"), new_tiny("together")
    assert alone.launch(*SHORT) == 0
    assert prepare_data.main([str(together.recipe)]) == 0, "several nodes do not wait for it"
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NNODES": "2", "NPROC": "1"}
    nodes = [
        start(together, sabotage={0: "kill:1:10"}, NODE_RANK=rank, MAX_RESTARTS="1", **meeting) for rank in ("1", "0")
    ]
    ends = [finish(node) for node in nodes]
    assert [status for status, _ in ends] == [0, 0], ends
    said = "".join(said for _, said in ends)
    assert said.count("done:") == 1
    assert said.count("was killed by SIGKILL") == 1
    assert "2 (dp_replicate) x 1 (dp_shard) x 1 (tp) processes" in said, "a replica on each node"
    assert steps(together) == steps(alone)
    assert final_loss(together) == pytest.approx(final_loss(alone), rel=1e-5)
