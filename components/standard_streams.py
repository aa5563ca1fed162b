"""Standard input, output and error as a command finds them: closed, full, in another encoding, or with nobody reading.

A module that is a command ends with `sys.exit(run_command(main))`.
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
    """Run `main`, the body of a command; returns its exit status, or 130 after Ctrl-C.

    The command ends with status 0 where the reader of its output has left, as in `| head`, and with 1 and a message
    where the output cannot be written. A character that the encoding of the terminal lacks is written as an escape.
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
            # What is still buffered has to go somewhere, or the interpreter fails over it when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self.fileno() == 2 or error.errno == errno.EIO:  # EIO: the terminal is gone, and SIGHUP says so
                return len(data)  # there is nowhere left to report to
            if error.errno == errno.EPIPE:
                raise SystemExit(0) from None
            print(f"standard output cannot be written: {error.strerror}", file=sys.stderr)
            raise SystemExit(1) from None


def _open_streams() -> None:
    """Make all three streams usable, and leave none of their descriptors to a file that is opened later.

    A metrics file that became descriptor 1 would receive what some library prints.
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
    """A text stream to `descriptor`, buffered as `before` was."""
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
