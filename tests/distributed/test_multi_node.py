"""Two launchers that connect form one run, also when one of them is lost and comes back."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from benchmarks.torture.killed_run import free_port
from benchmarks.torture.nodes import kill_all, rendezvous_port
from tests.conftest import TinyRun
from tests.distributed.launching import ROOT, SHORT, final_loss, finish, start, steps
from tests.processes import start_process, wait_until
from tools import prepare_data


def test_two_nodes_train_as_one_also_after_a_failure_on_one_of_them(new_tiny):
    alone, together = new_tiny("alone"), new_tiny("together")
    assert alone.launch(*SHORT) == 0
    assert prepare_data.main([str(together.recipe)]) == 0, "several nodes do not wait for it"
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NNODES": "2", "NPROC": "1"}
    nodes = [
        start(together, sabotage={0: "kill:1:10"}, NODE_RANK=rank, MAX_RESTARTS="1", **rendezvous)
        for rank in ("1", "0")
    ]
    ends = [finish(node) for node in nodes]
    assert [status for status, _ in ends] == [0, 0], ends
    said = "".join(said for _, said in ends)
    assert said.count("done:") == 1
    assert said.count("was killed by SIGKILL") == 1
    assert "2 (dp_replicate) x 1 (dp_shard) x 1 (tp) processes" in said, "a replica on each node"
    assert steps(together) == steps(alone)
    assert final_loss(together) == pytest.approx(final_loss(alone), rel=1e-5)


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_node_whose_workers_cannot_start_ends_the_run_of_the_others(new_tiny, restarts):
    tiny = new_tiny("run")
    assert prepare_data.main([str(tiny.recipe)]) == 0
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NNODES": "2", "NPROC": "1"}
    rendezvous["NODE_TIMEOUT"] = "10"
    waiting = start(tiny, NODE_RANK="0", MAX_RESTARTS=restarts, **rendezvous)
    failing = start(tiny, "--run.device=cuda", NODE_RANK="1", CUDA_VISIBLE_DEVICES="", **rendezvous)
    status, said = finish(failing)
    assert status == 2, said
    assert "this machine has no CUDA device" in said
    status, said = finish(waiting)
    assert status == 1, said
    assert "another node has ended the run" in said, "its worker would wait for half an hour"


NODE = """
import sys
from components.distributed.launcher import run_workers
from components.distributed.membership import Patience
from components.distributed.node import NodeSpec
rank, port, *worker = sys.argv[1:]
node = NodeSpec(processes=1, nodes=2, rank=int(rank), port=int(port), max_restarts=1, patience=Patience(lost_after=5))
sys.exit(run_workers([sys.executable, "-c", *worker], node))
"""
UPLOADING = """
import pathlib, sys, time
from components.distributed.worker import report_connected, report_exit
report_connected()
time.sleep(12)
pathlib.Path(sys.argv[1]).touch()
sys.exit(report_exit(1, "the run stopped itself"))
"""
STOPPING = """
import sys
from components.distributed.worker import report_connected, report_exit
report_connected()
sys.exit(report_exit(1, "the run stopped itself"))
"""


ALONE = """
import resource, sys
from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from components.distributed.launcher import run_workers
from components.distributed.node import NodeSpec
def cannot_listen(*_):
    raise DistNetworkError("no such address")
if sys.argv[1] == "cannot listen":
    DynamicRendezvousHandler._create_tcp_store_server = cannot_listen
else:
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
worker = "import os, resource; soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); os._exit(soft != hard)"
sys.exit(run_workers([sys.executable, "-c", worker], NodeSpec(processes=1)))
"""


@pytest.mark.parametrize(("case", "status"), [("cannot listen", 1), ("few descriptors", 0)])
def test_the_launcher_listens_for_the_workers_of_the_run(case, status):
    ended, said = finish(
        start_process([sys.executable, "-c", ALONE, case], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    )
    assert ended == status, said
    assert ("cannot listen for workers: no such address" in said) == (case == "cannot listen"), said


def test_workers_that_are_connected_may_finish_after_those_of_another_node_have_failed(tmp_path):
    """As rank 0 uploads a checkpoint after the run has stopped itself on all ranks."""
    port, done = str(free_port()), tmp_path / "uploaded"
    nodes = [
        start_process([sys.executable, "-c", NODE, rank, port, *worker], cwd=ROOT, stdout=subprocess.PIPE)
        for rank, worker in (("0", [UPLOADING, str(done)]), ("1", [STOPPING]))
    ]
    assert [finish(node)[0] for node in nodes] == [1, 1]
    assert done.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_nodes_can_meet_also_if_the_output_is_full():
    port = free_port()
    with Path("/dev/full").open("w") as full:
        server = start_process(
            [sys.executable, "-m", "tools.rendezvous", "--port", str(port)],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    try:
        assert "standard output cannot be written" in server.stderr.readline()
        TCPStore("127.0.0.1", port, is_master=False).set("key", "value")
    finally:
        server.kill()
        server.communicate()


LONGER = ["--training.total_tokens=5760"]
"""Thirty steps."""


def processes_after_restarts(tiny: TinyRun) -> list[int]:
    return [row["restart_processes"] for row in tiny.rows() if "restart_processes" in row]


def has_step(tiny: TinyRun, step: int) -> bool:
    file = tiny.directory / "metrics.jsonl"
    return file.exists() and any(row["step"] >= step for row in tiny.rows())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["taken away", "first machine, and the rendezvous is elsewhere"])
def test_a_node_that_dies_is_left_out_and_admitted_again(new_tiny, how):
    """The samples, the batches and the losses are those of one process."""
    alone, elastic = new_tiny("alone"), new_tiny("elastic")
    assert alone.launch(*SHORT, *LONGER) == 0
    assert prepare_data.main([str(elastic.recipe)]) == 0
    server, ranks, port, keys = None, ("0", "1"), str(free_port()), list(LONGER)
    if how.startswith("first"):
        rendezvous = [sys.executable, "-m", "tools.rendezvous", "--port", "0"]
        server = start_process(rendezvous, cwd=ROOT, stdout=subprocess.PIPE)
        ranks, port = ("1", "1"), rendezvous_port(server)  # none of them listens
        keys += ["--checkpoint.interval_steps=none", "--checkpoint.in_memory_interval_steps=1"]
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NNODES": "1:2", "NPROC": "1", "JOIN_AFTER": "0",
        "NODE_TIMEOUT": "10", "PACE": "0.3", "PACED_WHILE": str(elastic.folder / "paced"),
    }  # fmt: skip
    (elastic.folder / "paced").touch()
    try:
        nodes = [
            start(elastic, *keys, NODE_RANK=rank, NODE_ADDR=f"127.0.0.{number}", **environment)
            for number, rank in enumerate(ranks, start=1)
        ]
        dies, stays = nodes if server is not None else reversed(nodes)
        wait_until(lambda: has_step(elastic, 5), stays)
        if how == "taken away":
            dies.send_signal(signal.SIGTERM)
        else:
            kill_all(dies.pid)
        dies.communicate()
        assert dies.returncode == (143 if how == "taken away" else -signal.SIGKILL)
        wait_until(lambda: has_step(elastic, 10), stays)
        back = start(elastic, *keys, NODE_RANK="1", NODE_ADDR="127.0.0.3", **environment)
        wait_until(lambda: processes_after_restarts(elastic) == [1, 2], stays)
        (elastic.folder / "paced").unlink()
        ends = [finish(each) for each in (stays, back)]
    finally:
        if server is not None:
            server.kill()
            server.communicate()
    assert [status for status, _ in ends] == [0, 0], ends
    said, log = ends[0][1], (elastic.directory / "log.txt").read_text()
    for text in (said, log):
        assert text.count("left; nodes of the run: 1") == 1, text
        assert text.count("127.0.0.3 (process") == text.count("joined; nodes of the run: 2") == 1, text
    assert log.count("the nodes change, and all processes are restarted") == 1 + (how == "taken away"), "it saves first"
    rows = [row for row in elastic.rows() if "loss" in row]
    expected = [row for row in alone.rows() if "loss" in row]
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [*range(1, 31)]
    assert [row["samples"] for row in rows] == [row["samples"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    lost = [row["restart_lost_steps"] for row in elastic.rows() if "restart_processes" in row]
    assert lost[1] == 0, "the others save before they restart"
    if server is not None:
        assert lost[0] <= 1
        assert log.count("resumed from /dev/shm/powertrain-") == 1, "of the node that is left"
