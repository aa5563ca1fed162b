"""The files that W&B writes offline: which steps they have.

W&B keeps rows in memory for some seconds, and loses them when its process is killed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_FILE_HEADER_BYTES, _BLOCK_BYTES = 7, 2**15
_HEADER = struct.Struct("<IHB")
"""Of a part of a record: checksum, length and kind. https://github.com/google/leveldb/blob/main/doc/log_format.md"""
_FULL, _LAST = 1, 4
"""The kinds of a part that ends a record."""


def last_offline_step(directory: Path, run: str) -> int:
    """Return the last step in the files of the run below `directory`, or 0 without any."""
    steps = (step for file in directory.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb") for step in read_steps(file))
    return max(steps, default=0)


def read_steps(file: Path) -> Iterator[int]:
    """Yield the step of each row in a file. Raises ValueError if it is damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto.wandb_internal_pb2 import Record

    for data in read_records(file.read_bytes()):
        try:
            record = Record.FromString(data)
        except DecodeError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        if record.HasField("history"):
            yield record.history.step.num


def read_records(data: bytes) -> Iterator[bytes]:
    """Yield the complete records of a file. A record may have several parts, and no part spans two blocks."""
    position, record = _FILE_HEADER_BYTES, b""
    while True:
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _HEADER.size:
            position += left_in_block
        if position + _HEADER.size > len(data):
            return
        _, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        if position + length > len(data):
            return
        record += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield record
            record = b""
