"""A pool of processes that tokenize groups of files, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import numpy as np

from components.data.document import SourceFile
from components.interfaces import Tokenizer


def is_picklable(*values: object) -> bool:
    """Return whether `values` can be sent to another process."""
    try:
        pickle.dumps(values)
    except Exception:  # a custom class may raise any exception
        return False
    return True


def run_in_processes(
    work: Callable[..., None],
    groups: Sequence[Sequence[SourceFile]],
    tokenizer: Tokenizer,
    processes: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Call `work(group, tokenizer=, encode=, on_progress=)` for every group in a pool of `processes`.

    Raises the first error of `work`, and OSError if a process was killed.
    """
    context = multiprocessing.get_context("spawn")  # forking a process with threads may hang
    progress: Any = context.Queue()
    pool = ProcessPoolExecutor(processes, context, _Worker.start, (tokenizer, progress))
    try:
        pending: set[Future[tuple[int, int]]] = {pool.submit(_Worker.run, work, group) for group in groups}
        late_bytes = late_tokens = 0
        while pending:
            done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
            for future in done:
                group_bytes, group_tokens = future.result()
                late_bytes, late_tokens = late_bytes + group_bytes, late_tokens + group_tokens
            with suppress(queue.Empty):
                while True:
                    read_bytes, tokens = progress.get_nowait()
                    late_bytes, late_tokens = late_bytes - read_bytes, late_tokens - tokens
                    on_progress(read_bytes, tokens)
        if late_bytes or late_tokens:  # a process sends by a thread, which may be later than the result of its group
            on_progress(late_bytes, late_tokens)
    except BrokenProcessPool:
        raise OSError(
            "a process that prepared data was killed, possibly because memory ran out; start again to continue: "
            "finished shards are kept"
        ) from None
    finally:
        # Without the kill, shutdown would wait until the processes have finished their groups.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)


class _Worker:
    """State and entry points of a process of the pool."""

    tokenizer: Tokenizer
    progress: Any

    @classmethod
    def start(cls, tokenizer: Tokenizer, progress: Any) -> None:
        cls.tokenizer, cls.progress = tokenizer, progress
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and stops the pool
        threading.Thread(target=_die_with_parent, daemon=True).start()

    @classmethod
    def run(cls, work: Callable[..., None], group: Sequence[SourceFile]) -> tuple[int, int]:
        """Work on a group, and return the bytes and tokens that it has reported in all."""
        reported: list[tuple[int, int]] = []

        def report(read_bytes: int, tokens: int) -> None:
            reported.append((read_bytes, tokens))
            cls.progress.put((read_bytes, tokens))

        work(group, tokenizer=cls.tokenizer, encode=cls.encode, on_progress=report)
        return sum(read_bytes for read_bytes, _ in reported), sum(tokens for _, tokens in reported)

    @classmethod
    def encode(cls, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode one text at a time: for several, a tokenizer would start threads, and all processors are busy."""
        return [cls.tokenizer.encode_batch([text])[0] for text in texts]


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
