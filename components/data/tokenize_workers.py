"""A pool of processes that tokenize groups of files, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from components.data.document import SourceFile
from components.interfaces import Tokenizer


def is_picklable(*values: object) -> bool:
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
    # bytes and tokens of each group; without a lock, which a process that is killed might hold
    shared = context.RawArray("q", 2 * len(groups))
    progress = np.frombuffer(shared, dtype=np.int64).reshape(-1, 2)
    pool = ProcessPoolExecutor(processes, context, _Worker.start, (tokenizer, shared))
    try:
        pending = {pool.submit(_Worker.run, work, number, group) for number, group in enumerate(groups)}
        reported = np.zeros(2, dtype=np.int64)
        while pending:
            done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            total = progress.sum(axis=0)
            if (total > reported).any():
                on_progress(*(total - reported).tolist())
            reported = total
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
    """Bytes and tokens of group 0, of group 1, ..."""

    @classmethod
    def start(cls, tokenizer: Tokenizer, progress: Any) -> None:
        cls.tokenizer, cls.progress = tokenizer, progress
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and stops the pool
        threading.Thread(target=_die_with_parent, daemon=True).start()

    @classmethod
    def run(cls, work: Callable[..., None], number: int, group: Sequence[SourceFile]) -> None:
        def report(read_bytes: int, tokens: int) -> None:
            cls.progress[2 * number] += read_bytes
            cls.progress[2 * number + 1] += tokens

        work(group, tokenizer=cls.tokenizer, encode=cls.encode, on_progress=report)

    @classmethod
    def encode(cls, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode one text at a time: for several, a tokenizer would start threads, and all processors are busy."""
        return [cls.tokenizer.encode_batch([text])[0] for text in texts]


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
