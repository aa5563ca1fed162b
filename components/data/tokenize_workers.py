"""Processes that tokenize groups of files, one processor each."""

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
    except Exception:  # a user's class may raise anything
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

    Raises what `work` raises, and OSError where a process was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    progress: Any = context.Queue()
    pool = ProcessPoolExecutor(processes, context, _Worker.start, (tokenizer, progress))
    try:
        pending: set[Future[None]] = {pool.submit(_Worker.run, work, group) for group in groups}
        while pending:
            done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            with suppress(queue.Empty):
                while True:
                    on_progress(*progress.get_nowait())
    except BrokenProcessPool:
        raise OSError(
            "a process that prepared data was killed, perhaps for want of memory; start again to go on: what is "
            "encoded so far is kept"
        ) from None
    finally:
        for process in list((pool._processes or {}).values()):  # an interrupted one would finish its group first
            process.kill()
        pool.shutdown(cancel_futures=True)


class _Worker:
    """What a process of the pool keeps between two groups."""

    tokenizer: Tokenizer
    progress: Any

    @classmethod
    def start(cls, tokenizer: Tokenizer, progress: Any) -> None:
        cls.tokenizer, cls.progress = tokenizer, progress
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends the pool
        threading.Thread(target=_die_with_parent, daemon=True).start()

    @classmethod
    def run(cls, work: Callable[..., None], group: Sequence[SourceFile]) -> None:
        work(
            group,
            tokenizer=cls.tokenizer,
            encode=cls.encode,
            on_progress=lambda read_bytes, tokens: cls.progress.put((read_bytes, tokens)),
        )

    @classmethod
    def encode(cls, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode one text at a time: a tokenizer starts threads for several, and the other processors are taken."""
        return [cls.tokenizer.encode_batch([text])[0] for text in texts]


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
