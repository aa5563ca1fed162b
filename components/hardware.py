"""Peak FLOP/s, memory and bandwidth of devices, and the memory in use."""

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
"""Part of a device's name (the first match counts) -> vendor's dense bf16 peak in TFLOP/s, memory in 10^9 bytes, and
bandwidth to the other devices of its node in GB/s, one direction, by NVLink or else PCIe."""

_LEAST_PRODUCTS = 5
_MEASURED_SECONDS = 0.1
"""A CPU is measured by at least as many matrix products, and for this time."""


@dataclass(frozen=True)
class DeviceSpec:
    """The device of one process."""

    name: str
    flops: float
    """Peak matrix FLOP/s in bf16 (CPU: in its fastest dtype)."""
    memory_bytes: int
    link_bytes: float | None = None
    """Bytes per second to another device of its node, one direction; None if devices share memory."""


def device_spec(name: str) -> DeviceSpec:
    """Return a device of `DEVICES` by name, case-insensitive, or this machine for `cpu`. Raises ValueError."""
    if name.lower() == "cpu":
        cpu = torch.device("cpu")
        measured = [peak_flops(cpu, dtype) or 0.0 for dtype in (torch.float32, torch.bfloat16)]
        return DeviceSpec("cpu", max(measured), device_memory(cpu))
    if (found := _known_device(name)) is None:
        raise ValueError(f"{name} is not a known device; use one of {', '.join([*DEVICES, 'cpu'])}")
    tera_flops, gigabytes, link_gigabytes = DEVICES[found]
    return DeviceSpec(name, tera_flops * 1e12, gigabytes * 10**9, link_gigabytes * 1e9)


def _known_device(name: str) -> str | None:
    plain = name.lower().replace("-", " ").replace("_", " ")
    # a part of the name, but not of a longer number: A100 does not match A1000
    return next((part for part in DEVICES if re.search(rf"{re.escape(part.lower())}(?!\d)", plain)), None)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak matrix FLOP/s of one process's device in `dtype`; None if unknown.

    For GPUs it is the published value. For a CPU it is measured once per process, for about a tenth of a second, as the
    best of several products of matrices of up to 1024 x 1024 on one thread, times the number of threads, so MFU is
    relative to this machine's matrix product. One such product in bf16 can take seconds of a core that has no
    instruction for it: the size grows while the time allows.
    """
    if device.type == "cuda":
        found = _known_device(torch.cuda.get_device_name(device))
        return DEVICES[found][0] * 1e12 if found is not None and dtype == torch.bfloat16 else None
    if device.type != "cpu":
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * _flops_of_thread(dtype)
    finally:
        torch.set_num_threads(threads)


def _flops_of_thread(dtype: torch.dtype) -> float:
    """Return the FLOP/s of this thread, in its processor time: on a busy machine, products wait for each other."""
    size, products, flops, best = 128, 0, 0, 0.0
    # Limits the time at the best rate, because the first product also prepares kernels.
    while products < _LEAST_PRODUCTS or flops / best < _MEASURED_SECONDS:
        a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        start = time.thread_time()
        a @ b
        products, flops = products + 1, flops + 2 * size**3
        best = max(best, 2 * size**3 / (time.thread_time() - start))
        if size < 1024 and products >= _LEAST_PRODUCTS and 8 * 2 * size**3 / best < _MEASURED_SECONDS - flops / best:
            size *= 2
    return best


def device_memory(device: torch.device) -> int:
    """Return the memory of the device in bytes; for a CPU that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return int(psutil.virtual_memory().total)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory allocated so far on a GPU, or the resident memory of the process elsewhere, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)
