"""Nodes with a network of their own, in network namespaces of this machine, and links that are cut.

Needs root and iproute2 (`apt-get install iproute2`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.distributed.launching import SHORT, finish, start
from tests.distributed.test_multi_node import LONGER, has_step, processes_after_restarts
from tests.processes import wait_until
from tools import prepare_data

IP = shutil.which("ip") or "/usr/sbin/ip"


def can_make_namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() or not Path(IP).exists():
        return False
    made = subprocess.run([IP, "netns", "add", "pt-probe"], capture_output=True)
    subprocess.run([IP, "netns", "delete", "pt-probe"], capture_output=True)
    return made.returncode == 0


pytestmark = pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces: iproute2")
NODES = ("a", "b")


class Network:
    """Two hosts and the link between them."""

    def __init__(self, name: str) -> None:
        self.names = {node: f"pt-{name}-{node}" for node in NODES}

    def make(self) -> None:
        a, b = self.names.values()
        for namespace in (a, b):
            self.ip("netns", "add", namespace)
            self.ip("-n", namespace, "link", "set", "lo", "up")
        self.ip("link", "add", "veth0", "netns", a, "type", "veth", "peer", "name", "veth0", "netns", b)
        for node, namespace in self.names.items():
            self.ip("-n", namespace, "address", "add", f"{self.address(node)}/24", "dev", "veth0")
            self.ip("-n", namespace, "link", "set", "veth0", "up")

    def remove(self) -> None:
        for namespace in self.names.values():
            subprocess.run([IP, "netns", "delete", namespace], capture_output=True)

    def cut(self, node: str) -> None:
        """Unplug the cable of a node. No connection is closed: packets are lost."""
        self.ip("-n", self.names[node], "link", "set", "veth0", "down")

    def mend(self, node: str) -> None:
        self.ip("-n", self.names[node], "link", "set", "veth0", "up")

    def address(self, node: str) -> str:
        return f"10.77.0.{1 + NODES.index(node)}"

    def start(self, node: str, tiny: TinyRun, **environment: str) -> subprocess.Popen[str]:
        """Start a launcher on a node."""
        here = {
            "NNODES": "1:2", "NPROC": "1", "NODE_ADDR": self.address(node), "MASTER_ADDR": self.address("a"),
            "NODE_TIMEOUT": "10", "JOIN_AFTER": "1", "GLOO_SOCKET_IFNAME": "veth0", "PACE": "0.3",
            "PACED_WHILE": str(tiny.folder / "paced"),
        }  # fmt: skip
        return start(tiny, *LONGER, prefix=[IP, "netns", "exec", self.names[node]], **here, **environment)

    @staticmethod
    def ip(*arguments: str) -> None:
        subprocess.run([IP, *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(str(os.getpid()))
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The rows of the steps of an undisturbed run of one process."""
    tiny = TinyRun(tmp_path_factory.mktemp("alone"))
    assert tiny.launch(*SHORT, *LONGER) == 0
    return [row for row in tiny.rows() if "loss" in row]


def check_rows(tiny: TinyRun, expected: list[dict]) -> None:
    """Check that the run has the samples and losses of an undisturbed one."""
    rows = [row for row in tiny.rows() if "loss" in row]
    assert [(row["step"], row["samples"]) for row in rows] == [(row["step"], row["samples"]) for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


def test_a_node_that_is_cut_off_ends_and_comes_back(tiny, network, expected):
    assert prepare_data.main([str(tiny.recipe)]) == 0
    (tiny.folder / "paced").touch()
    first, second = (network.start(node, tiny) for node in NODES)
    wait_until(lambda: has_step(tiny, 4), first)
    network.cut("b")
    status, said = finish(second)  # without a word from the other
    assert status == 1
    assert f"this node, {network.address('b')}, lost contact with the others" in said
    wait_until(lambda: has_step(tiny, 12), first)  # the other, without a closed connection either
    network.mend("b")
    third = network.start("b", tiny)
    wait_until(lambda: processes_after_restarts(tiny) == [1, 2], first)
    (tiny.folder / "paced").unlink()
    ends = [finish(each) for each in (first, third)]
    assert [status for status, _ in ends] == [0, 0], ends
    said = ends[0][1]
    assert f"lost contact with {network.address('b')}" in said
    assert said.count("joined; nodes of the run: 2") == 1, said
    check_rows(tiny, expected)
