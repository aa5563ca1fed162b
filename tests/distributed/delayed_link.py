"""Two hosts of this machine and a link between them that delays every packet, in network namespaces.

Each end is a TUN device, whose packets a thread passes to the other end after the delay. Needs root and iproute2.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from types import TracebackType

from tests.distributed.test_networks import Network

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class DelayedLink(Network):
    """The network of `Network`, whose device `veth0` is the end of a delayed link."""

    def __init__(self, name: str, delay_seconds: float) -> None:
        super().__init__(name)
        self.delay_seconds = delay_seconds
        self.ends: list[int] = []
        self.thread = threading.Thread(target=self.forward, daemon=True)
        self.is_open = True

    def __enter__(self) -> DelayedLink:
        for index, (node, namespace) in enumerate(self.names.items()):
            device = f"pt{os.getpid()}-{index}"
            self.ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            fcntl.ioctl(self.ends[-1], TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
            self.ip("netns", "add", namespace)
            self.ip("link", "set", device, "netns", namespace, "name", "veth0")
            self.ip("-n", namespace, "address", "add", f"{self.address(node)}/24", "dev", "veth0")
            for each in ("lo", "veth0"):
                self.ip("-n", namespace, "link", "set", each, "up")
        self.thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.is_open = False
        if self.thread.is_alive():
            self.thread.join()
        for end in self.ends:
            os.close(end)
        self.remove()

    def forward(self) -> None:
        """Pass packets on until the link is closed. The delay is constant, so they leave in the order of arrival."""
        waiting: deque[tuple[float, int, bytes]] = deque()
        while self.is_open:
            patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.05
            for end in select.select(self.ends, [], [], min(patience, 0.05))[0]:
                other = self.ends[1 - self.ends.index(end)]
                waiting.append((time.monotonic() + self.delay_seconds, other, os.read(end, 65536)))
            while waiting and waiting[0][0] <= time.monotonic():
                _, end, packet = waiting.popleft()
                os.write(end, packet)
