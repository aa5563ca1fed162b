"""Tokens/s of the loader, of a bare memory map, and of torchdata and datasets pipelines, from prepared tokens.

    python -m benchmarks.loader [--megatokens 100] [--rounds 5] [--sequence-length 1024] [--micro-batch-size 8]

All yield shuffled micro-batches of int64 inputs and labels from the same ids, in this process; they take turns, in an
order that changes with the round. Cold: the system was asked before to drop the file from its cache (posix_fadvise),
which a shared or virtual disk may ignore. `datasets` reads an Arrow file of the same sequences.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torchdata.nodes import Batcher, Loader, Mapper, MapStyleWrapper

from benchmarks.shared import machine, quartiles, spread
from components.data import TokenFiles
from components.data.loader import MicroBatchLoader
from components.data.order import SampleOrder
from components.tokenizers import Bytes

Batches = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]


def micro_batch_loader(dataset: Any, size: int, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with MicroBatchLoader(dataset, seed=0, micro_batch_size=size, num_workers=workers) as loader:
        while True:
            (micro,) = loader.next_step(1)
            yield micro.tokens, micro.labels


def memory_map(path: Path, length: int, sequences: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Read as nanoGPT does, but every sequence once, in the order of the loader."""
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    _, indices = SampleOrder(sequences, seed=0)(np.arange(sequences))
    for start in range(0, sequences - size, size):
        rows = [tokens[i * length : (i + 1) * length + 1].astype(np.int64) for i in indices[start : start + size]]
        block = torch.from_numpy(np.stack(rows))
        yield block[:, :-1].contiguous(), block[:, 1:].contiguous()


class Sequences(torch.utils.data.Dataset):
    """A dataset for torchdata or a DataLoader: one sequence of the memory map per item."""

    def __init__(self, path: Path, length: int, sequences: int):
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self.length, self.sequences = length, sequences

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, index: int) -> torch.Tensor:
        part = self.tokens[index * self.length : (index + 1) * self.length + 1]
        return torch.from_numpy(part.astype(np.int64))


def with_torchdata(data: Sequences, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sampler = torch.utils.data.RandomSampler(data, generator=generator)
    batches = Batcher(MapStyleWrapper(data, sampler), batch_size=size)
    return iter(Loader(Mapper(batches, _pair)))


def _pair(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    block = torch.stack(rows)
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def with_datasets(data: Any, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in data.shuffle(seed=0).with_format("torch").iter(batch_size=size):
        block = batch["ids"].long()
        yield block[:, :-1].contiguous(), block[:, 1:].contiguous()


def drop_from_cache(path: Path) -> None:
    """Ask the system to drop the file from its cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def tokens_per_second(batches: Batches, length: int, count: int) -> float:
    """Return tokens per second of `count` micro-batches after the first, which starts processes."""
    stream = batches()
    next(stream)
    start, tokens = time.perf_counter(), 0
    for inputs, _ in islice(stream, count - 1):
        tokens += inputs.numel()
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=1000, help="micro-batches of one measurement")
    options = parser.parse_args()
    length, size = options.sequence_length, options.micro_batch_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        ids = np.random.default_rng(0).integers(0, 257, options.megatokens * 10**6, dtype=np.uint16)
        ids.tofile(path)
        sequences = (len(ids) - 1) // length
        count = min(options.micro_batches, sequences // size)
        dataset = TokenFiles(path=path).build(
            tokenizer=Bytes().build(), sequence_length=length, cache_dir=Path(folder), progress=print
        )
        rows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length][: count * size]
        arrow = datasets.Dataset.from_generator(
            lambda: ({"ids": row} for row in rows),
            features=datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"))}),
            cache_dir=folder,
        )
        ways: dict[str, Batches] = {
            "loader": lambda: micro_batch_loader(dataset, size, 0),
            "loader, 1 worker": lambda: micro_batch_loader(dataset, size, 1),
            "memory map": lambda: memory_map(path, length, sequences, size),
            "torchdata": lambda: with_torchdata(Sequences(path, length, sequences), size),
            "datasets": lambda: with_datasets(arrow, size),
        }
        speeds: dict[str, list[float]] = {f"{name}, {state}": [] for name in ways for state in ("cold", "warm")}
        for turn in range(options.rounds):
            for name in sorted(ways, reverse=bool(turn % 2)):
                drop_from_cache(path)
                speeds[f"{name}, cold"].append(tokens_per_second(ways[name], length, count) / 1e6)
                speeds[f"{name}, warm"].append(tokens_per_second(ways[name], length, count) / 1e6)
        print(f"{machine()}; {count} micro-batches of {size} x {length}, {options.rounds} rounds in turn")
        for name, values in speeds.items():
            print(f"{name:24} {spread(values)} M tokens/s, with quartiles {quartiles(values, '.3g')}")


if __name__ == "__main__":
    main()
