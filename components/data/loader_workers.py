"""Worker processes of the loader: their signals, their deaths, and the sockets through which they hand over data."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

_waiting = False


@contextmanager
def raise_worker_deaths() -> Iterator[None]:
    """Let a worker that dies, or has died, raise RuntimeError within the block."""
    global _waiting
    _waiting = True
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        _waiting = False


def defer_worker_deaths() -> None:
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


def start_worker(last_words: Any, worker: int) -> None:
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


def end_workers(stream: Any) -> None:
    if hasattr(stream, "_shutdown_workers"):
        stream._shutdown_workers()
        for worker in stream._workers:
            if worker.is_alive():  # stuck in a read, and deaf to SIGTERM
                worker.kill()
