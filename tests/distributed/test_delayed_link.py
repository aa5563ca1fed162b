"""Goodput on two nodes with a delayed link, in real time: its choice is about that of the times that it measured."""

from __future__ import annotations

import os
import random

import pytest

from benchmarks.torture.virtual_network import HOSTS, Network, why_impossible
from tests.conftest import TinyRun
from tests.distributed.launching import finish, start
from tools import prepare_data

IMPOSSIBLE = why_impossible()
pytestmark = pytest.mark.skipif(IMPOSSIBLE is not None, reason=str(IMPOSSIBLE))
DELAY_SECONDS = 0.02
GOODPUT = [
    "--batch.use=components.batch:Goodput", "--batch.initial_size=4", "--batch.max_size=128", "--batch.multiple_of=4",
    "--batch.min_efficiency=0.1", "--batch.max_growth=2", "--training.total_tokens=5000",
]  # fmt: skip


def launch(tiny: TinyRun, network: Network, host: str):
    variables = {"NNODES": "2", "NPROC": "1", "NODE_RANK": str(HOSTS.index(host)), **network.environment(host)}
    return start(tiny, *GOODPUT, prefix=network.on(host), **variables)


def test_the_batch_grows_with_the_delay_of_the_link(tiny):
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=4000)  # little to learn: gradients are noise
    (tiny.folder / "text" / "0.txt").write_text("".join(letters))
    assert prepare_data.main([str(tiny.recipe)]) == 0
    network = Network(f"delayed-{os.getpid()}")
    try:
        network.make()
        network.link.delay = DELAY_SECONDS
        ends = [finish(process) for process in [launch(tiny, network, host) for host in HOSTS]]
    finally:
        network.remove()
    assert [status for status, _ in ends] == [0, 0], ends
    rows = [row for row in tiny.rows() if "loss" in row]
    assert rows[-1]["goodput_fixed_seconds"] > DELAY_SECONDS, "at least one reduction"
    assert rows[0]["global_batch_size"] == 4 < rows[-1]["global_batch_size"]
