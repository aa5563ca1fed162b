"""What the benchmarks share: recipes to measure, a stop-watch that is a component, and tables with their spread."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DEBUG = ROOT / "train_configs" / "debug.toml"


@dataclass(kw_only=True)
class StopwatchBatch:
    """A constant batch that notes the time at which every step starts: it measures whole steps, from outside."""

    initial: int
    """Global batch size, in samples."""
    starts: list[float] = field(default_factory=list, init=False)

    def samples(self, progress: object) -> int:
        self.starts.append(time.perf_counter())
        return self.initial

    def observe(self, progress: object, moments: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def step_seconds(self, skip: int) -> list[float]:
        """Seconds from each start to the next, without the first `skip`."""
        return [later - earlier for earlier, later in zip(self.starts, self.starts[1:], strict=False)][skip:]


READY = "ready for a step"


def wait_for_turn() -> None:
    """In a measured process: say that a step is over and wait until the measuring one lets the next begin."""
    print(READY, flush=True)
    sys.stdin.readline()


@dataclass(kw_only=True)
class TurnsBatch:
    """A constant batch whose every step waits for its turn."""

    initial: int
    """Global batch size, in samples."""

    def samples(self, progress: object) -> int:
        wait_for_turn()
        return self.initial

    def observe(self, progress: object, moments: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Median, lowest and highest: "0.52 (0.50 to 0.55)"."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def machine() -> str:
    """One line that says what was measured on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{gpu}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
