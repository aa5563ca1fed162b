"""Shared parts of the benchmarks: components that measure or need no files, and tables with their spread."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.batch import Constant
from components.hardware import peak_memory_bytes

ROOT = Path(__file__).resolve().parent.parent
DEBUG = ROOT / "train_configs" / "debug.toml"


@dataclass(frozen=True, kw_only=True)
class StopwatchBatch(Constant):
    """A constant batch that records the start time of every step, to measure whole steps from outside."""

    starts: list[float] = field(default_factory=list, init=False)

    def next_batch_size(self, progress: object) -> int:
        self.starts.append(time.perf_counter())
        return self.initial_size

    def step_seconds(self, skip: int) -> list[float]:
        """Return the seconds from each start to the next, without the first `skip`."""
        return [later - earlier for earlier, later in zip(self.starts, self.starts[1:], strict=False)][skip:]


READY = "ready for a step"


def wait_for_turn() -> None:
    """In a measured process: report that a step is done and wait until the measuring process starts the next."""
    print(READY, flush=True)
    sys.stdin.readline()


@dataclass(frozen=True, kw_only=True)
class TurnsBatch(Constant):
    """A constant batch that waits for its turn before every step."""

    def next_batch_size(self, progress: object) -> int:
        wait_for_turn()
        return self.initial_size


@dataclass(frozen=True, kw_only=True)
class PeakMemoryBatch(Constant):
    """A constant batch that writes the peak memory of this process after every step, to a file for each rank."""

    folder: Path
    """An existing directory for files `rank-<n>` with two numbers: bytes before the model was built, and peak bytes."""
    before: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", peak_memory_bytes(torch.device("cpu")))

    def observe(self, progress: object, noise: object) -> None:
        if torch.cuda.is_initialized():
            before, peak = 0, torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            before, peak = self.before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        (self.folder / f"rank-{os.environ.get('RANK', '0')}").write_text(f"{before} {peak}")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """[tokenizer] without a file: a number of ids without text."""

    vocab_size: int

    @property
    def end_of_document(self) -> int:
        return self.vocab_size - 1

    @property
    def byte_lengths(self) -> np.ndarray:
        return np.zeros(self.vocab_size, dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        return f"vocabulary of {self.vocab_size}"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise ValueError("this tokenizer has ids only, without text")

    def decode(self, ids: Sequence[int]) -> str:
        raise ValueError("this tokenizer has ids only, without text")

    def build(self) -> Vocabulary:
        return self


class RandomDataset:
    """Sequences of random ids in memory."""

    def __init__(self, sequences: int, length: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocab_size, (sequences, length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return self.tokens[list(indices)]


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """[data] without a file: a few sequences of random ids, repeated."""

    sequences: int = 256

    def build(
        self, *, tokenizer: Any, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> RandomDataset:
        return RandomDataset(self.sequences, sequence_length + 1, tokenizer.vocab_size)


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Return median, lowest and highest as text: "0.52 (0.50 to 0.55)"."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def quartiles(values: Sequence[float], form: str = ".2f") -> str:
    """Return median, lower and upper quartile as text: "0.52 (0.50 to 0.55)"."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds of one call, with what it launches on the GPU."""
    _synchronize()
    start = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def mean_and_deviation(values: Sequence[float], form: str = ".4f") -> str:
    """Return mean and standard deviation as text: "0.52 ± 0.03", or "-" without values."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def repeat_with(module: str) -> str:
    """Return the lines that tell how to repeat this benchmark: its module and the arguments it was started with."""
    return f"\nRepeat with:\n\n    python -m {module} {shlex.join(sys.argv[1:])}".rstrip()


def machine() -> str:
    """Return a line that describes this machine."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{gpu}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
