"""Worker processes of the loader: signals, detection of their death, and the sockets that transfer data."""

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
    """Raise RuntimeError in the block if a worker dies or has died."""
    global _waiting
    _waiting = True
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        _waiting = False


def defer_worker_deaths() -> None:
    """Raise for the death of a worker only within `raise_worker_deaths`.

    torch raises it from its SIGCHLD handler, anywhere in the program, such as in the middle of an optimizer step.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    in_main = threading.current_thread() is threading.main_thread()  # in other threads, torch sets no handler
    if in_main and callable(handler) and not hasattr(handler, "is_deferred"):
        deferred: Any = lambda number, frame: handler(number, frame) if _waiting else None  # noqa: E731
        deferred.is_deferred = True
        signal.signal(signal.SIGCHLD, deferred)


def check_workers(num_workers: int) -> None:
    """Raise OSError if worker processes cannot send data to this process.

    They use Unix sockets in the directory of temporary files, and the path of a socket is limited to about 100 bytes.
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
                f"worker processes cannot open their sockets, with paths such as {name} of "
                f"{len(os.fsencode(name))} bytes ({error}); set TMPDIR to a shorter path, such as /tmp"
            ) from None
        os.unlink(name)  # noqa: PTH108


def start_worker(errors: Any, worker: int) -> None:
    """Ignore signals, and exit with the reason in `errors` when data cannot be sent to the main process.

    Ctrl-C, the SIGTERM of a scheduler or a closing terminal reach the workers too, but the run needs data until it has
    saved a checkpoint.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def end(error: Exception, block: object) -> None:
        errors.send(f"{type(error).__name__}: {error}")
        os._exit(1)

    # By default the feeder thread prints a traceback and drops the batch, for which the run would wait forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def end_workers(iterator: Any) -> None:
    """Stop the workers of a data loader iterator; those that do not respond are killed."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():  # stuck in a read, and SIGTERM is ignored
                worker.kill()
