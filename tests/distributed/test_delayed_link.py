"""Goodput on two nodes with a delayed link, in real time: its choice is about that of the times that it measured."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.distributed.delayed_link import DelayedLink
from tests.distributed.launching import finish, start
from tests.distributed.test_networks import IP, NODES, can_make_namespaces
from tools import prepare_data

pytestmark = pytest.mark.skipif(
    not can_make_namespaces() or not Path("/dev/net/tun").exists(), reason="needs root, iproute2 and TUN devices"
)
DELAY_SECONDS = 0.02
GOODPUT = [
    "--batch.use=components.batch:Goodput", "--batch.initial_size=4", "--batch.max_size=128", "--batch.multiple_of=4",
    "--batch.min_efficiency=0.1", "--batch.max_growth=2", "--training.total_tokens=5000",
]  # fmt: skip


def launch(tiny: TinyRun, link: DelayedLink, node: str):
    variables = {
        "NNODES": "2", "NPROC": "1", "NODE_RANK": str(NODES.index(node)), "MASTER_ADDR": link.address("a"),
        "GLOO_SOCKET_IFNAME": "veth0",
    }  # fmt: skip
    return start(tiny, *GOODPUT, prefix=[IP, "netns", "exec", link.names[node]], **variables)


def test_the_batch_grows_with_the_delay_of_the_link(tiny):
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=4000)  # little to learn: gradients are noise
    (tiny.folder / "text" / "0.txt").write_text("".join(letters))
    assert prepare_data.main([str(tiny.recipe)]) == 0
    with DelayedLink(f"delayed-{os.getpid()}", DELAY_SECONDS) as link:
        ends = [finish(process) for process in [launch(tiny, link, node) for node in NODES]]
    assert [status for status, _ in ends] == [0, 0], ends
    rows = [row for row in tiny.rows() if "loss" in row]
    assert rows[-1]["goodput_fixed_seconds"] > DELAY_SECONDS, "at least one reduction"
    assert rows[0]["global_batch_size"] == 4 < rows[-1]["global_batch_size"]
