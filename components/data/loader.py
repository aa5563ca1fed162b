"""Micro-batches of fixed shape from one global order of samples, read here or in workers of torchdata's
StatefulDataLoader.

A step takes a multiple of (data-parallel size x micro-batch size) samples, so micro-batch t of rank r always holds the
same samples, however many micro-batches the previous steps took: when the batch size changes, nothing prefetched is
discarded, and the number of samples is the only state.
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
"""Samples whose order is computed at a time: 4096 take 0.8 ms on a CPU core, and 2 take 0.2 ms."""
_PREFETCH_FACTOR = 4
"""Micro-batches that each worker reads ahead."""
_TIMEOUT_SECONDS = 600.0


def build_order(dataset: PackedDataset, *, seed: int) -> Order:
    """Return the global order of the samples of `dataset`: `dataset.order(seed=)` if it has one."""
    if isinstance(dataset, HasOrder):
        return dataset.order(seed=seed)
    return SampleOrder(len(dataset), seed=seed)


def epochs(dataset: PackedDataset, consumed: int) -> dict[str, Any]:
    """Return the epochs in the first `consumed` samples, of the dataset and of each source of a mixture."""
    whole: dict[str, Any] = {"epoch": consumed / len(dataset)}
    return whole | ({"source_epochs": dataset.source_epochs(consumed)} if hasattr(dataset, "source_epochs") else {})


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass."""

    tokens: Tensor
    """(m, T) int64, contiguous."""
    labels: Tensor
    """(m, T) int64, contiguous: the next token of each of `tokens`."""
    sample_ids: Tensor
    """(m,) int64 global sample numbers."""


class MicroBatchLoader:
    """Reads the micro-batches of one rank: number t is the m global samples from start + (t*dp_size + dp_rank)*m.

    It never ends: epochs follow one another, each in another order. Close it, or use it as a context manager, to stop
    the workers.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        seed: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        """`start` is the first global sample not trained on yet; it may come from a run on any number of ranks.

        Each of `num_workers` processes reads ahead; without workers, a micro-batch is read when it is requested. If
        workers give none for `_TIMEOUT_SECONDS`, reading raises OSError.
        """
        if micro_batch_size < 1 or min(start, num_workers) < 0 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"micro_batch_size = {micro_batch_size} (expected >= 1), start = {start}, num_workers = {num_workers} "
                f"(expected >= 0), dp_rank = {dp_rank} (expected 0 <= dp_rank < dp_size = {dp_size})"
            )
        self._epoch_size = len(dataset)
        self._warned_repeats = False
        self._stride = dp_size * micro_batch_size
        self._num_read = 0  # micro-batches requested on this rank
        first = start + dp_rank * micro_batch_size
        # a reader whose next samples are beyond the chunk would compute it for every micro-batch
        chunk = ORDER_CHUNK if self._stride * max(1, num_workers) < ORDER_CHUNK else micro_batch_size
        self._settings: dict[str, Any] = {
            "dataset": _OrderedDataset(dataset, build_order(dataset, seed=seed), chunk),
            "batch_sampler": _SampleNumbers(first, self._stride, micro_batch_size),
            "collate_fn": _identity_collate,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "generator": torch.Generator(),  # or starting workers would draw from the global one
            "snapshot_every_n_steps": 2**62,  # never: the sample number of the training clock is the state
        }
        if num_workers:
            self._worker_errors, writer = multiprocessing.Pipe(duplex=False)
            self._settings |= {"prefetch_factor": _PREFETCH_FACTOR, "worker_init_fn": partial(start_worker, writer)}
            self._settings |= {"timeout": _TIMEOUT_SECONDS}
        self._iterator: Iterator[Tensor | Exception] | None = None
        self._at_exit = partial(_close, weakref.ref(self))

    def next_step(self, micro_batches: int) -> Iterator[MicroBatch]:
        """Return an iterator over the next `micro_batches` of this rank, each read when it is requested.

        It may be left early if every rank leaves it after the same micro-batch; the next call continues from there.
        `next` raises the error of reading, also one of a worker; called again, it continues with the next micro-batch.
        """
        if micro_batches < 1:
            raise ValueError(f"micro_batches = {micro_batches}: expected an integer >= 1")
        if (step := micro_batches * self._stride) > self._epoch_size and not self._warned_repeats:
            self._warned_repeats = True
            log.warning(f"a step of {step:,} samples repeats some of the {self._epoch_size:,} sequences of the data")
        return map(self._next, range(micro_batches))  # unlike a generator, it can continue after an error

    @property
    def last_samples(self) -> range:
        """Global sample numbers of the last requested micro-batch, even if it could not be read."""
        first = self._settings["batch_sampler"].first + (self._num_read - 1) * self._stride
        return range(first, first + self._settings["batch_sampler"].size)

    def close(self) -> None:
        """Stop the workers. The next request starts them again at the current position."""
        iterator, self._iterator = self._iterator, None
        atexit.unregister(self._at_exit)
        end_workers(iterator)

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next(self, _: int) -> MicroBatch:
        requested = time.monotonic()
        try:
            if self._iterator is None:
                self._start_reading()
            self._num_read += 1  # also if reading fails: the next call continues after it
            assert self._iterator is not None
            with raise_worker_deaths():
                block = next(self._iterator)
        except Exception as error:
            self.close()  # an iterator that has raised cannot continue; the next call starts another
            if not isinstance(error, RuntimeError) or not self._settings["num_workers"]:
                raise
            if self._worker_errors.poll():
                raise OSError(f"a loader worker failed: {self._worker_errors.recv()}") from None
            if time.monotonic() - requested >= self._settings["timeout"]:
                raise OSError(
                    f"no micro-batch in {self._settings['timeout']:g} s: the disk with the data does not respond"
                ) from error
            # The worker was killed, or ran out of shared memory.
            if "DataLoader worker" in str(error) and "Caught" not in str(error):
                raise OSError(f"a loader worker died: {error}") from None
            raise
        if isinstance(block, Exception):
            raise block
        return MicroBatch(block[0], block[1], torch.arange(self.last_samples.start, self.last_samples.stop))

    def _read_here(self, sample_ids: range) -> Tensor | Exception:
        block: Tensor | Exception = self._settings["dataset"].__getitems__(sample_ids)
        return block.pin_memory() if self._settings["pin_memory"] and isinstance(block, Tensor) else block

    def _start_reading(self) -> None:
        numbers: _SampleNumbers = self._settings["batch_sampler"]
        numbers.skip = self._num_read
        if not self._settings["num_workers"]:  # a StatefulDataLoader takes longer to call than the samples to read
            self._iterator = map(self._read_here, numbers)
            return
        with warnings.catch_warnings():  # torchdata 0.11 uses what torch 2.13 deprecates
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            try:
                self._iterator = iter(StatefulDataLoader(**self._settings))
            except OSError as error:
                raise OSError(f"cannot start {self._settings['num_workers']} loader workers: {error}") from error
        # Registered after the exit hook of multiprocessing, so it runs before that one, which would wait forever.
        atexit.register(self._at_exit)
        defer_worker_deaths()


@dataclass
class _SampleNumbers:
    """Batch sampler: the global sample numbers of each micro-batch of one rank, infinitely."""

    first: int
    stride: int
    size: int
    skip: int = 0
    """Micro-batches to skip at the start."""

    def __iter__(self) -> Iterator[range]:
        return (range(start, start + self.size) for start in count(self.first + self.skip * self.stride, self.stride))


class _OrderedDataset:
    """The dataset by global sample number. Both ordering and reading happen in the workers."""

    def __init__(self, dataset: PackedDataset, order: Order, chunk: int):
        self.dataset = dataset
        self.order = order
        self.chunk = chunk
        self._first = 0
        self._indices: list[int] = []  # of the samples from `_first` on: computing the order is fast only in bulk

    def __getitems__(self, sample_ids: range) -> Tensor | Exception:
        """Return (2, m, T) int64, inputs and labels: one tensor is sent between processes and pinned in one operation.

        An error of reading is returned: torch would wrap a raised one in a worker's traceback.
        """
        if not self._first <= sample_ids.start <= sample_ids.stop <= self._first + len(self._indices):
            self._first = sample_ids.start
            bulk = np.arange(sample_ids.start, max(sample_ids.stop, sample_ids.start + self.chunk))
            self._indices = self.order(bulk)[1].tolist()
        indices = self._indices[sample_ids.start - self._first : sample_ids.stop - self._first]
        try:
            sequences = self._read(indices)
        except (ValueError, OSError) as error:
            if type(error).__module__ not in ("builtins", InputError.__module__):
                raise  # may not survive pickling
            return error
        return torch.stack((sequences[:, :-1], sequences[:, 1:]))

    def _read(self, indices: Sequence[int]) -> Tensor:
        """Return (m, T+1) int64 token ids."""
        if hasattr(self.dataset, "__getitems__"):
            sequences = self.dataset.__getitems__(indices)
        else:
            sequences = [self.dataset[index] for index in indices]
            if len(lengths := {len(sequence) for sequence in sequences}) > 1:
                raise ValueError(
                    f"the dataset returns samples of {min(lengths)} and of {max(lengths)} token ids; all must be equal"
                )
        return sequences if isinstance(sequences, Tensor) else torch.stack(list(sequences))


def _identity_collate(block: Tensor | Exception) -> Tensor | Exception:
    return block


def _close(reference: weakref.ref[MicroBatchLoader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()
