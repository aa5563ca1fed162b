"""Micro-batches of fixed shape from one global order of samples, through torchdata's StatefulDataLoader.

A step takes whole multiples of (data-parallel size x micro-batch) samples, so micro-batch t of rank r always holds the
same samples, however many micro-batches the steps before it took: a batch that grows or shrinks discards nothing that
was prefetched, and the only state is a number of samples.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails
from torchdata.stateful_dataloader import StatefulDataLoader

from components.data.order import SampleOrder
from components.errors import InputError

# m micro-batch size, T sequence length

log = logging.getLogger("powertrain")

_ORDERED_AT_ONCE = 4096


class Samples(Protocol):
    """Packed sequences. `__getitems__(indices) -> (n, T+1)`, where there is one, is used to read many at once."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Tensor: ...


class Order(Protocol):
    """(n,) global sample numbers -> (n,) epochs, (n,) indices into the samples: a pure function."""

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


def order_of(samples: Samples, *, seed: int, shuffle: bool = True) -> Order:
    """The global order of `samples`: their own, where they have an `order(seed=, shuffle=)` as mixtures do."""
    if hasattr(samples, "order"):
        order: Order = samples.order(seed=seed, shuffle=shuffle)
        return order
    return SampleOrder(len(samples), seed=seed, shuffle=shuffle)


def epochs(samples: Samples, consumed: int) -> dict[str, Any]:
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
        samples: Samples,
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
        patience_seconds: float = 600.0,
    ):
        """`start` is the first global sample not yet trained on: any number, whatever layout trained those before it.

        `prefetch_factor` is how many micro-batches each of `num_workers` processes reads ahead; with no workers they
        are read as they are asked for. A worker that has given nothing for `patience_seconds` is given up.
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
        self._start = start
        self._given = 0  # micro-batches handed out by this rank
        self._cursor = start
        first = start + dp_rank * micro_batch_size
        self._settings: dict[str, Any] = {
            "dataset": _OrderedSamples(samples, order_of(samples, seed=seed, shuffle=shuffle)),
            "batch_sampler": _SampleNumbers(first, self._stride, micro_batch_size),
            "collate_fn": _as_it_is,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "generator": torch.Generator(),  # its own, or starting workers would draw from the global one
            "snapshot_every_n_steps": 2**62,  # the cursor is all the state there is
        }
        if num_workers:
            self._last_words, writer = multiprocessing.Pipe(duplex=False)
            self._settings |= {"prefetch_factor": prefetch_factor, "worker_init_fn": partial(_start_worker, writer)}
            self._settings |= {"timeout": patience_seconds}
        self._stream: Iterator[_Block | Exception] | None = None
        self._at_exit = partial(_close, weakref.ref(self))

    @property
    def cursor(self) -> int:
        """First global sample that no optimizer step has consumed: `start` of the loader that continues this run."""
        return self._cursor

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

    def consumed(self) -> None:
        """Call after the optimizer step: all that was handed out counts as trained on, and `cursor` moves past it."""
        self._cursor = self._start + self._given * self._stride

    def close(self) -> None:
        """End the workers. The loader goes on from where it was if it is asked for more."""
        stream, self._stream = self._stream, None
        atexit.unregister(self._at_exit)
        _end_workers(stream)

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
            with _waiting_for_workers():
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
        _defer_deaths()


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

    def __init__(self, samples: Samples, order: Order):
        self.samples = samples
        self.order = order
        self._first = 0
        self._indices: list[int] = []  # of the samples from `_first` on: the order is quick in bulk only

    def __getitems__(self, sample_ids: range) -> _Block | Exception:
        """Errors of reading are returned, to arrive as they were raised and not wrapped in a worker's trace."""
        if not self._first <= sample_ids.start <= sample_ids.stop <= self._first + len(self._indices):
            self._first = sample_ids.start
            bulk = np.arange(sample_ids.start, max(sample_ids.stop, sample_ids.start + _ORDERED_AT_ONCE))
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


def _as_it_is(block: _Block | Exception) -> _Block | Exception:
    return block


_waiting = False


@contextmanager
def _waiting_for_workers() -> Iterator[None]:
    """Let a worker that dies, or has died, raise RuntimeError within the block."""
    global _waiting
    _waiting = True
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        _waiting = False


def _defer_deaths() -> None:
    """Keep the death of a worker from raising anywhere else, such as halfway through an update of the optimizer.

    torch raises it from its handler of SIGCHLD, wherever the process is.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere torch sets no handler either
    if in_main and callable(handler) and not hasattr(handler, "when_waiting"):
        deferred: Any = lambda number, frame: handler(number, frame) if _waiting else None  # noqa: E731
        deferred.when_waiting = True
        signal.signal(signal.SIGCHLD, deferred)


def check_workers(num_workers: int) -> None:
    """Raise OSError where worker processes could not hand over what they read.

    They do so through Unix sockets in the directory of temporary files, whose names have a limit of some 100 bytes.
    """
    if not num_workers:
        return
    folder = multiprocessing.util.get_temp_dir()
    with socket.socket(socket.AF_UNIX) as probe:
        name = os.path.join(folder, "listener-xxxxxxxx")  # noqa: PTH118
        try:
            probe.bind(name)
        except OSError as error:
            raise OSError(
                f"worker processes cannot open the sockets through which they hand over data, with names such as "
                f"{name} of {len(os.fsencode(name))} bytes ({error}); set TMPDIR to a shorter path, such as /tmp"
            ) from None
        os.unlink(name)  # noqa: PTH108


def _start_worker(last_words: Any, worker: int) -> None:
    """Let signals pass, and end where the queue to the run cannot be filled, saying why.

    A Ctrl-C, a scheduler's SIGTERM or a closing terminal reaches the workers too; the run must be fed until it has
    saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def end(error: Exception, block: object) -> None:
        last_words.send(f"{type(error).__name__}: {error}")
        os._exit(1)

    # By default the thread that fills the queue prints a trace, drops the block, and the run waits for it in vain.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def _end_workers(stream: Any) -> None:
    if hasattr(stream, "_shutdown_workers"):
        stream._shutdown_workers()
        for worker in stream._workers:
            if worker.is_alive():  # stuck in a read, and deaf to SIGTERM
                worker.kill()


def _close(reference: weakref.ref[MicroBatchLoader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()
