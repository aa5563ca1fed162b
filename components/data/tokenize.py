"""Encoding what is not encoded yet: on all cores, with progress, and from where a killed process stopped."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from components.data.document import Piece
from components.data.shard_writer import SHARD_TOKENS, encode_group
from components.data.shards import Encoded, catalogue
from components.interfaces import Tokenizer

_GROUP_BYTES = 2**25
_GROUP_PIECES = 2**12
"""Neighbouring pieces are encoded together up to this size and number; a larger piece is a group by itself."""

_WORTH_PROCESSES = 2**26
"""Bytes of source below which starting processes takes longer than it saves."""


@dataclass(frozen=True)
class Preparation:
    """How far preparing has come; `str` makes a line for people."""

    source: str
    done_bytes: int
    total_bytes: int
    """0 where the source does not know."""
    tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = self.done_bytes / max(self.seconds, 1e-9)
        line = f"preparing {self.source}: {self.done_bytes / 1e6:,.1f}"
        if self.total_bytes:
            left = max(0, self.total_bytes - self.done_bytes) / max(rate, 1e-9)
            line += (
                f" of {self.total_bytes / 1e6:,.1f} MB ({self.done_bytes / self.total_bytes:.0%}), {left:,.0f} s left"
            )
        else:
            line += " MB"
        return f"{line}; {self.tokens:,} tokens, {rate / 1e6:.1f} MB/s"


class Reporter:
    """Adds up what was done, and reports it from time to time."""

    def __init__(self, source: str, total_bytes: int, report: Callable[[Preparation], None], report_seconds: float):
        self._source, self._total = source, total_bytes
        self._report, self._seconds = report, report_seconds
        self._started = self._reported = time.monotonic()
        self._bytes = self._tokens = 0

    def advance(self, read_bytes: int, tokens: int) -> None:
        self._bytes, self._tokens = self._bytes + read_bytes, self._tokens + tokens
        now = time.monotonic()
        if now - self._reported >= self._seconds:
            self._reported = now
            self._report(Preparation(self._source, self._bytes, self._total, self._tokens, now - self._started))


def encode_missing(
    pieces: Sequence[Piece],
    store: Path,
    *,
    tokenizer: Tokenizer,
    source: str,
    report: Callable[[Preparation], None],
    report_seconds: float,
    shard_tokens: int = SHARD_TOKENS,
    group_bytes: int = _GROUP_BYTES,
    processes: int | None = None,
) -> dict[str, Encoded]:
    """Encode the pieces that `store` does not hold; returns where every piece lies, by content.

    If another process does the same meanwhile, the first to finish a shard wins and both succeed. `source` is for
    people; `report` is called at most every `report_seconds`; `processes` is by default chosen by cores and work.
    Raises ValueError or OSError for what cannot be read or encoded; what was encoded until then stays.
    """
    there = catalogue(store)
    wanted = list({piece.content: piece for piece in pieces}.values())
    groups = [
        missing
        for group in grouped(wanted, group_bytes)
        if (missing := [piece for piece in group if piece.content not in there])
    ]
    total = sum(piece.size_bytes for group in groups for piece in group)
    reporter = Reporter(source, total, report, report_seconds)
    work = partial(encode_group, store=store, shard_tokens=shard_tokens)
    if processes is None:
        processes = min(len(groups), cores()) if total >= _WORTH_PROCESSES else 1
    if processes > 1 and _can_be_sent(tokenizer, groups):
        _encode_in_processes(groups, work, tokenizer, processes, reporter)
    else:
        for group in groups:
            work(group, tokenizer=tokenizer, encode=tokenizer.encode_batch, advance=reporter.advance)
    return catalogue(store) if groups else there


def grouped(pieces: Sequence[Piece], group_bytes: int) -> Iterator[list[Piece]]:
    """Neighbours together until they are large enough."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and (size + piece.size_bytes > group_bytes or len(group) >= _GROUP_PIECES):
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.size_bytes
    if group:
        yield group


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _can_be_sent(*what: object) -> bool:
    try:
        pickle.dumps(what)
    except Exception:  # whatever a class of the user's own raises
        return False
    return True


def _encode_in_processes(
    groups: Sequence[Sequence[Piece]],
    work: Callable[..., None],
    tokenizer: Tokenizer,
    processes: int,
    reporter: Reporter,
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    progress: Any = context.Queue()
    pool = ProcessPoolExecutor(processes, context, _Worker.start, (tokenizer, progress))
    try:
        waiting: set[Future[None]] = {pool.submit(_Worker.run, work, group) for group in groups}
        while waiting:
            done, waiting = wait(waiting, timeout=0.1, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            for read_bytes, tokens in _all_of(progress):
                reporter.advance(read_bytes, tokens)
    except BrokenProcessPool:
        raise OSError(
            "a process that prepared data was killed, perhaps for want of memory; start again to go on: what is "
            "encoded so far is kept"
        ) from None
    finally:
        for process in list((pool._processes or {}).values()):  # an interrupted one would finish its group first
            process.kill()
        pool.shutdown(cancel_futures=True)


def _all_of(progress: Any) -> Iterator[tuple[int, int]]:
    while True:
        try:
            yield progress.get_nowait()
        except queue.Empty:
            return


class _Worker:
    """A process that encodes groups, one core each."""

    tokenizer: Tokenizer
    progress: Any

    @classmethod
    def start(cls, tokenizer: Tokenizer, progress: Any) -> None:
        cls.tokenizer, cls.progress = tokenizer, progress
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends us
        threading.Thread(target=_die_with_parent, daemon=True).start()

    @classmethod
    def run(cls, work: Callable[..., None], group: Sequence[Piece]) -> None:
        work(
            group,
            tokenizer=cls.tokenizer,
            encode=cls.encode,
            advance=lambda read_bytes, tokens: cls.progress.put((read_bytes, tokens)),
        )

    @classmethod
    def encode(cls, texts: Sequence[str]) -> list[np.ndarray]:
        """One text at a time: a tokenizer starts threads for several, and the other cores are taken."""
        return [cls.tokenizer.encode_batch([text])[0] for text in texts]


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
