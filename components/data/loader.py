"""Micro-batches of fixed shape from one global order of samples, through torchdata's StatefulDataLoader.

A step takes whole multiples of (data-parallel size x micro-batch) samples, so micro-batch t of rank r always holds the
same samples, however many micro-batches the steps before it took: a batch that grows or shrinks discards nothing that
was prefetched, and the only state is a number of samples.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from components.data.loader_workers import defer_worker_deaths, end_workers, raise_worker_deaths, start_worker
from components.data.order import SampleOrder
from components.errors import InputError
from components.interfaces import HasOrder, Order, PackedDataset

# m micro-batch size, T sequence length

log = logging.getLogger("powertrain")

ORDER_CHUNK = 4096


def build_order(samples: PackedDataset, *, seed: int, shuffle: bool = True) -> Order:
    """The global order of `samples`: their own, where they have an `order(seed=, shuffle=)` as mixtures do."""
    if isinstance(samples, HasOrder):
        return samples.order(seed=seed, shuffle=shuffle)
    return SampleOrder(len(samples), seed=seed, shuffle=shuffle)


def epochs(samples: PackedDataset, consumed: int) -> dict[str, Any]:
    """How often the data was gone through in the first `consumed` samples: in all, and each source of a mixture."""
    whole: dict[str, Any] = {"epoch": consumed / len(samples)}
    return whole | ({"source_epochs": samples.source_epochs(consumed)} if hasattr(samples, "source_epochs") else {})


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass takes."""

    tokens: Tensor
    """(m, T) int64, contiguous."""
    labels: Tensor
    """(m, T) int64, contiguous: the token after each of `tokens`."""
    sample_ids: Tensor
    """(m,) int64 global sample numbers: what each is follows from the order alone."""


class MicroBatchLoader:
    """The micro-batches of one rank: number t holds global samples start + (t*dp_size + dp_rank)*m and the m - 1 after.

    Never ends: epochs follow one another, each in its own order. Close it, or use it as a context manager, to end the
    workers at once.
    """

    def __init__(
        self,
        samples: PackedDataset,
        *,
        seed: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 4,
        timeout_seconds: float = 600.0,
    ):
        """`start` is the first global sample not yet trained on: any number, whatever layout trained those before it.

        `prefetch_factor` is how many micro-batches each of `num_workers` processes reads ahead; with no workers they
        are read as they are asked for. A worker that has given nothing for `timeout_seconds` is given up.
        """
        if micro_batch_size < 1 or start < 0 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"micro_batch_size = {micro_batch_size} (at least 1), start = {start} (at least 0), "
                f"dp_rank = {dp_rank} (below dp_size = {dp_size})"
            )
        if num_workers < 0 or prefetch_factor < 1:
            raise ValueError(
                f"num_workers = {num_workers} (at least 0), prefetch_factor = {prefetch_factor} (at least 1)"
            )
        self._epoch = len(samples)
        self._told_of_repeats = False
        self._stride = dp_size * micro_batch_size
        self._given = 0  # micro-batches handed out by this rank
        first = start + dp_rank * micro_batch_size
        self._settings: dict[str, Any] = {
            "dataset": _OrderedSamples(samples, build_order(samples, seed=seed, shuffle=shuffle)),
            "batch_sampler": _SampleNumbers(first, self._stride, micro_batch_size),
            "collate_fn": _identity_collate,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "generator": torch.Generator(),  # its own, or starting workers would draw from the global one
            "snapshot_every_n_steps": 2**62,  # the clock of the run is all the state there is
        }
        if num_workers:
            self._last_words, writer = multiprocessing.Pipe(duplex=False)
            self._settings |= {"prefetch_factor": prefetch_factor, "worker_init_fn": partial(start_worker, writer)}
            self._settings |= {"timeout": timeout_seconds}
        self._stream: Iterator[_Block | Exception] | None = None
        self._at_exit = partial(_close, weakref.ref(self))

    def next_step(self, micro_batches: int) -> Iterator[MicroBatch]:
        """The next `micro_batches` of this rank, each read when it is asked for.

        Leaving early is allowed, if every rank leaves after the same one: the next call goes on from there. `next` on
        it raises what reading raised, also when it was raised in a worker; called again, it goes on with the next
        micro-batch.
        """
        if micro_batches < 1:
            raise ValueError(f"a step of {micro_batches} micro-batches: expected at least 1")
        if (step := micro_batches * self._stride) > self._epoch and not self._told_of_repeats:
            self._told_of_repeats = True
            log.warning(f"a step of {step:,} samples sees the {self._epoch:,} sequences of the data again")
        return map(self._next, range(micro_batches))  # unlike a generator it goes on after an error

    @property
    def last_samples(self) -> range:
        """Global numbers of the samples of the micro-batch asked for last, also if they could not be read."""
        first = self._settings["batch_sampler"].first + (self._given - 1) * self._stride
        return range(first, first + self._settings["batch_sampler"].size)

    def close(self) -> None:
        """End the workers. The loader goes on from where it was if it is asked for more."""
        stream, self._stream = self._stream, None
        atexit.unregister(self._at_exit)
        end_workers(stream)

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next(self, _: int) -> MicroBatch:
        asked = time.monotonic()
        try:
            if self._stream is None:
                self._start_reading()
            self._given += 1  # also of one that cannot be read: the next call goes on after it
            assert self._stream is not None
            with raise_worker_deaths():
                block = next(self._stream)
        except Exception as error:
            self.close()  # a stream that has raised gives nothing more; the next call starts another
            if not isinstance(error, RuntimeError) or not self._settings["num_workers"]:
                raise
            if self._last_words.poll():
                raise OSError(f"a loader worker cannot go on: {self._last_words.recv()}") from None
            if time.monotonic() - asked >= self._settings["timeout"]:
                raise OSError(
                    f"no micro-batch in {self._settings['timeout']:g} s: the disk that holds the data does not answer"
                ) from error
            if "DataLoader worker" in str(error) and "Caught" not in str(error):  # killed, or out of shared memory
                raise OSError(f"a loader worker has ended: {error}") from None
            raise
        if isinstance(block, Exception):
            raise block
        return MicroBatch(block.pair[0], block.pair[1], block.sample_ids)

    def _start_reading(self) -> None:
        self._settings["batch_sampler"].skip = self._given
        with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.13 is about to drop
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            try:
                self._stream = iter(StatefulDataLoader(**self._settings))
            except OSError as error:
                raise OSError(f"cannot start {self._settings['num_workers']} loader workers: {error}") from error
        # After multiprocessing's own exit hook, hence run before it: that one would wait for our workers for ever.
        atexit.register(self._at_exit)
        defer_worker_deaths()


@dataclass(frozen=True)
class _Block:
    """A micro-batch on its way: one tensor for inputs and labels, to cross processes and be pinned in one go."""

    pair: Tensor
    """(2, m, T) int64"""
    sample_ids: Tensor
    """(m,) int64"""

    def pin_memory(self) -> _Block:
        return _Block(self.pair.pin_memory(), self.sample_ids)


@dataclass
class _SampleNumbers:
    """Global sample numbers of each micro-batch of one rank, without end."""

    first: int
    stride: int
    size: int
    skip: int = 0
    """Micro-batches to leave out at the start."""

    def __iter__(self) -> Iterator[range]:
        return (range(start, start + self.size) for start in count(self.first + self.skip * self.stride, self.stride))


class _OrderedSamples:
    """The data by global sample number. Lives in the workers, so ordering and reading both happen there."""

    def __init__(self, samples: PackedDataset, order: Order):
        self.samples = samples
        self.order = order
        self._first = 0
        self._indices: list[int] = []  # of the samples from `_first` on: the order is quick in bulk only

    def __getitems__(self, sample_ids: range) -> _Block | Exception:
        """Errors of reading are returned, to arrive as they were raised and not wrapped in a worker's trace."""
        if not self._first <= sample_ids.start <= sample_ids.stop <= self._first + len(self._indices):
            self._first = sample_ids.start
            bulk = np.arange(sample_ids.start, max(sample_ids.stop, sample_ids.start + ORDER_CHUNK))
            self._indices = self.order(bulk)[1].tolist()
        indices = self._indices[sample_ids.start - self._first : sample_ids.stop - self._first]
        try:
            sequences = self._read(indices)
        except (ValueError, OSError) as error:
            if type(error).__module__ not in ("builtins", InputError.__module__):
                raise  # may not survive pickling
            return error
        return _Block(
            torch.stack((sequences[:, :-1], sequences[:, 1:])), torch.arange(sample_ids.start, sample_ids.stop)
        )

    def _read(self, indices: Sequence[int]) -> Tensor:
        """(m, T+1)"""
        if hasattr(self.samples, "__getitems__"):
            sequences = self.samples.__getitems__(indices)
        else:
            sequences = [self.samples[index] for index in indices]
            if len(lengths := {len(sequence) for sequence in sequences}) > 1:
                raise ValueError(f"the dataset gives samples of {min(lengths)} and of {max(lengths)} token ids")
        return sequences if isinstance(sequences, Tensor) else torch.stack(list(sequences))


def _identity_collate(block: _Block | Exception) -> _Block | Exception:
    return block


def _close(reference: weakref.ref[MicroBatchLoader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()
