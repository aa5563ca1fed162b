"""A link between two network namespaces whose packets this process forwards: late, with losses, or in one direction.

Each end is a TUN device: the kernel hands over the packets that a namespace sends there, and takes those that arrive.
Needs root on Linux. The delay, losses and directions may be changed at any time.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

DEVICE = "link0"
"""Name of the device in both namespaces."""
_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_LARGEST_PACKET = 65536


class Link:
    """The link between two namespaces; ends are numbered 0 and 1. `close` removes its devices."""

    def __init__(self, namespaces: Sequence[str], seed: int = 0) -> None:
        """`namespaces` are the names that `ip netns` gave them."""
        self.delay = 0.0
        """Seconds until a packet arrives, in each direction."""
        self.loss = 0.0
        """Probability that a packet is lost, in each direction."""
        self.lost_from: set[int] = set()
        """Ends all of whose packets are lost: one of them is a half-open link, both are a cable that is cut."""
        self._rng = random.Random(seed)
        self._devices = [_open_device(name) for name in namespaces]
        self._closes, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.close(self._wake)
        self._thread.join()
        for descriptor in (self._closes, *self._devices):
            os.close(descriptor)

    def _forward(self) -> None:
        underway: deque[tuple[float, int, bytes]] = deque()
        """(time of arrival, end where it arrives, packet), in the order in which the packets were sent."""
        while True:
            wait = max(0.0, underway[0][0] - time.monotonic()) if underway else None
            readable, _, _ = select.select([*self._devices, self._closes], [], [], wait)
            if self._closes in readable:
                return
            for end, device in enumerate(self._devices):
                if device not in readable:
                    continue
                packet = os.read(device, _LARGEST_PACKET)
                if end not in self.lost_from and self._rng.random() >= self.loss:
                    underway.append((time.monotonic() + self.delay, 1 - end, packet))
            while underway and underway[0][0] <= time.monotonic():
                _, end, packet = underway.popleft()
                with suppress(OSError):  # the device is down: the packet is lost
                    os.write(self._devices[end], packet)


def _open_device(namespace: str) -> int:
    """Create the TUN device in a namespace, and return its descriptor."""
    opened: list[int] = []

    def create() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(Path("/run/netns") / namespace, os.O_RDONLY)
        try:
            if libc.setns(handle, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
        finally:
            os.close(handle)
        device = os.open(_TUN, os.O_RDWR)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        opened.append(device)

    # only the thread that calls setns enters the namespace, so it is one that ends
    thread = threading.Thread(target=create)
    thread.start()
    thread.join()
    return opened[0]
