"""Robust standard streams for commands: closed, on a full disk, with a limited encoding, or with a broken pipe.

A command module ends with `sys.exit(run_command(main))`.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


def run_command(main: Callable[[], int]) -> int:
    """Run `main`, the body of a command, and return its exit status, or 130 after Ctrl-C.

    The command exits with 0 if the reader of its output closed the pipe, as in `| head`, and with 1 and a message if
    the output cannot be written. Characters that the encoding of the terminal lacks are escaped.
    """
    _open_streams()
    try:
        os.getcwd()  # noqa: PTH109 (only whether there is one: every relative path needs it)
    except OSError as error:
        print(f"the current directory cannot be used: {error.strerror}; change to another one", file=sys.stderr)
        return 2
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # here, where an error can still be reported
    except KeyboardInterrupt:
        return 130


class _Output(io.FileIO):
    """The file behind standard output or standard error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Redirect what is still buffered to /dev/null, or the interpreter would fail to flush it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self.fileno() == 2 or error.errno == errno.EIO:  # EIO: the terminal is closed, which SIGHUP reports
                return len(data)  # there is no stream left to report to
            if error.errno == errno.EPIPE:
                raise SystemExit(0) from None
            print(f"standard output cannot be written: {error.strerror}", file=sys.stderr)
            raise SystemExit(1) from None


def _open_streams() -> None:
    """Make all three streams usable, and reserve their descriptors if they are closed.

    Otherwise a metrics file could get descriptor 1 and receive what libraries print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout, sys.stderr = _writer(1, sys.stdout), _writer(2, sys.stderr)


def _writer(descriptor: int, before: TextIO | None) -> TextIO:
    """Return a text stream to `descriptor` with the buffering of `before`."""
    if before is not None:
        with suppress(OSError):
            before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=getattr(before, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
        write_through=bool(getattr(before, "write_through", False)),
    )
