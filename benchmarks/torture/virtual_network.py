"""Two hosts with a network of their own: network namespaces of this machine, and an emulated link between them.

Needs root, /dev/net/tun and iproute2 (`apt-get install iproute2`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.torture.link import DEVICE, Link

IP = shutil.which("ip") or "/usr/sbin/ip"
HOSTS = ("a", "b")


def why_impossible() -> str | None:
    """Return why this process cannot make a network, or None if it can."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need Linux and root"
    if not Path(IP).exists() or not Path("/dev/net/tun").exists():
        return "network namespaces need `ip` (apt-get install iproute2) and /dev/net/tun"
    probe = Network(f"probe-{os.getpid()}")
    try:
        probe.make()
    except (OSError, IndexError, subprocess.CalledProcessError) as error:
        return f"this machine allows no network namespaces or TUN devices: {error}"
    finally:
        probe.remove()
    return None


class Network:
    """The hosts "a" and "b", and the link between them."""

    def __init__(self, name: str) -> None:
        """`name` distinguishes it from other networks on this machine."""
        self.namespaces = {host: f"pt-{name}-{host}" for host in HOSTS}
        self._link: Link | None = None

    def make(self) -> None:
        for namespace in self.namespaces.values():
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        self._link = Link(list(self.namespaces.values()))
        for host, namespace in self.namespaces.items():
            _ip("-n", namespace, "address", "add", f"{self.address(host)}/24", "dev", DEVICE)
            _ip("-n", namespace, "link", "set", DEVICE, "up")

    def remove(self) -> None:
        if self._link is not None:
            self._link.close()
        for namespace in self.namespaces.values():
            subprocess.run([IP, "netns", "delete", namespace], capture_output=True)

    @property
    def link(self) -> Link:
        assert self._link is not None, "`make` creates it"
        return self._link

    def cut(self, *senders: str) -> None:
        """Lose all packets that these hosts send; without hosts, those of both. No connection is closed."""
        self.link.lost_from = {HOSTS.index(host) for host in senders or HOSTS}

    def unplug(self, host: str) -> None:
        """Pull out the cable of a host, which notices that: it has no route any more."""
        _ip("-n", self.namespaces[host], "link", "set", DEVICE, "down")

    def restore(self) -> None:
        """Make the link a good one: it is plugged in at both ends, and nothing is lost or delayed."""
        self.link.lost_from, self.link.delay, self.link.loss = set(), 0.0, 0.0
        for namespace in self.namespaces.values():
            _ip("-n", namespace, "link", "set", DEVICE, "up")

    def address(self, host: str) -> str:
        return f"10.77.0.{1 + HOSTS.index(host)}"

    def on(self, host: str) -> list[str]:
        """Return the words to put before a command to run it on a host, which also has its own mounts."""
        return [IP, "netns", "exec", self.namespaces[host]]

    def environment(self, host: str) -> dict[str, str]:
        """Return the environment of a launcher on a host; the launcher of host "a" listens."""
        return {
            "NODE_ADDR": self.address(host), "MASTER_ADDR": self.address("a"), "GLOO_SOCKET_IFNAME": DEVICE,
        }  # fmt: skip


def _ip(*arguments: str) -> None:
    subprocess.run([IP, *arguments], check=True, capture_output=True, text=True)
