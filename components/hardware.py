"""What a step costs: memory, and how fast the hardware could be, the denominator of MFU."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache

import torch

DEVICES = {
    "B200": (2250, 180, 900),
    "H200": (989, 141, 450),
    "H100 PCIe": (756, 80, 64),
    "H100": (989, 80, 450),
    "A100 40GB": (312, 40, 300),
    "A100": (312, 80, 300),
    "L40S": (362, 48, 32),
    "RTX 4090": (165, 24, 32),
    "RTX 3090": (71, 24, 32),
}
"""Vendors' figures of one device, by a part of its name (the first match counts): dense bf16 peak in TFLOP/s, memory in
10^9 bytes, and bandwidth to the other devices of its node in GB/s, one direction: NVLink, or else PCIe."""


@dataclass(frozen=True)
class DeviceSpec:
    """What one process computes on."""

    name: str
    flops: float
    """Peak matrix FLOP/s in bf16 (a CPU: in the fastest it has)."""
    memory_bytes: int
    link_bytes: float | None = None
    """Bytes a second to another device of its node, one direction; None where they share the memory."""


def device_spec(name: str) -> DeviceSpec:
    """Return a device by name, in any case: one of `DEVICES`, or `cpu`, this machine. Raises ValueError."""
    if name.lower() == "cpu":
        import psutil

        measured = [peak_flops(torch.device("cpu"), dtype) or 0.0 for dtype in (torch.float32, torch.bfloat16)]
        return DeviceSpec("cpu", max(measured), psutil.virtual_memory().total)
    plain = name.lower().replace("-", " ").replace("_", " ")
    # a part of the name, but not of a larger number in it
    found = next((part for part in DEVICES if re.search(rf"{re.escape(part.lower())}(?!\d)", plain)), None)
    if found is None:
        raise ValueError(f"{name} is not a known device; use one of {', '.join([*DEVICES, 'cpu'])}")
    tera_flops, gigabytes, link_gigabytes = DEVICES[found]
    return DeviceSpec(name, tera_flops * 1e12, gigabytes * 10**9, link_gigabytes * 1e9)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak matrix FLOP/s of one process's device in `dtype`; None where it is unknown.

    GPUs have a published figure. A CPU's is measured, once in a process and for a tenth of a second, as the best of a
    few products of matrices of 1024 x 1024: MFU there is the share of what this machine's own matrix product reaches.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((tera_flops * 1e12 for part, (tera_flops, *_) in DEVICES.items() if part in name), None)
        return known if dtype == torch.bfloat16 else None
    if device.type != "cpu":
        return None
    size = 1024
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + 0.1
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def device_memory(device: torch.device) -> int:
    """Bytes of memory the device has; a machine's, for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return int(psutil.virtual_memory().total)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak device memory so far on a GPU, resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)
