"""What a step costs: time spent waiting, memory, and how fast the hardware could be, the denominator of MFU."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from components.profiler_range import profiler_range

T = TypeVar("T")

DENSE_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Vendors' dense bf16 peak of one device, by a part of its name; the first match counts."""

MEMORY_GB = {
    "B200": 180,
    "H200": 141,
    "H100": 80,
    "A100 40GB": 40,
    "A100": 80,
    "L40S": 48,
    "RTX 4090": 24,
    "RTX 3090": 24,
}
"""Vendors' memory of one device in 10^9 bytes, by a part of its name; the first match counts."""


@dataclass(frozen=True)
class Device:
    """What one process computes on."""

    name: str
    flops: float
    """Peak matrix FLOP/s in bf16 (a CPU: in the fastest it has)."""
    memory_bytes: int


def _of_device(plain: str, table: Mapping[str, float]) -> float | None:
    """The first entry whose name is part of `plain`, and not of a larger number in it."""
    return next((table[part] for part in table if re.search(rf"{re.escape(part.lower())}(?!\d)", plain)), None)


def named_device(name: str) -> Device:
    """A device by name, case aside: one of the tables above, or `cpu`, this machine. Raises ValueError."""
    if name.lower() == "cpu":
        import psutil

        measured = [peak_flops(torch.device("cpu"), dtype) or 0.0 for dtype in (torch.float32, torch.bfloat16)]
        return Device("cpu", max(measured), psutil.virtual_memory().total)
    plain = name.lower().replace("-", " ").replace("_", " ")
    peak = _of_device(plain, DENSE_BF16_FLOPS)
    memory = _of_device(plain, MEMORY_GB)
    if peak is None or memory is None:
        known = ", ".join([*MEMORY_GB, *(part for part in DENSE_BF16_FLOPS if part not in MEMORY_GB), "cpu"])
        raise ValueError(f"{name} is no device we know; one of {known}")
    return Device(name, peak, int(memory * 10**9))


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak matrix FLOP/s of one process's device in `dtype`; None where it is unknown.

    GPUs have a published figure. A CPU's is measured, once in a process and for a tenth of a second, as the best of a
    few products of matrices of 1024 x 1024: MFU there is the share of what this machine's own matrix product reaches.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((flops for part, flops in DENSE_BF16_FLOPS.items() if part in name), None)
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


class Waited(Iterator[T]):
    """Passes on what `source` yields and adds up, in `seconds`, the time it took to come."""

    def __init__(self, source: Iterator[T]) -> None:
        self.source = source
        self.seconds = 0.0

    def __next__(self) -> T:
        start = time.perf_counter()
        with profiler_range("next_micro_batch"):
            item = next(self.source)
        self.seconds += time.perf_counter() - start
        return item


def device_memory(device: torch.device) -> int:
    """Bytes of memory the device has; a machine's, for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return int(psutil.virtual_memory().total)


def memory_bytes(device: torch.device) -> int:
    """Peak device memory so far on a GPU, resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)
