"""Send files from process to process, in pieces, over a group of the CPU."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

_PIECE_BYTES = 2**26


class Sent(NamedTuple):
    """A file that this process sends."""

    path: Path
    to: int
    """Rank of the receiver."""


class Received(NamedTuple):
    """A file that this process receives."""

    path: Path
    size: int
    """In bytes, as the sender knows it."""
    source: int
    """Rank of the sender."""


def transfer(sent: Sent | None, received: Received | None, group: dist.ProcessGroup | None) -> None:
    """Send one file and receive another, at the same time; return when both are done.

    Every process calls it for its own part, in an order in which no two wait for each other. A file that cannot be
    written is received to its end, because the sender waits for that; OSError is raised afterwards.
    """
    size = 0 if sent is None else sent.path.stat().st_size
    out, left = size, 0 if received is None else received.size
    failure: OSError | None = None
    with ExitStack() as files:
        source = None if sent is None else files.enter_context(sent.path.open("rb"))
        target = None
        if received is not None:
            try:
                target = files.enter_context(received.path.open("wb"))
            except OSError as error:
                failure = error
        while out or left:
            waiting, piece = [], torch.empty(min(left, _PIECE_BYTES), dtype=torch.uint8)
            if out and sent is not None and source is not None:
                content = torch.frombuffer(bytearray(source.read(_PIECE_BYTES)), dtype=torch.uint8)
                out -= content.numel()
                waiting.append(dist.isend(content, sent.to, group=group))
            if left and received is not None:
                left -= piece.numel()
                waiting.append(dist.irecv(piece, received.source, group=group))
            for work in waiting:
                assert work is not None  # this process is in the group
                work.wait()
            if target is not None and failure is None:
                try:
                    target.write(piece.numpy().data)
                except OSError as error:
                    failure = error
    if failure is not None:
        raise failure
