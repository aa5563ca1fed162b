"""An event file of TensorBoard, written one event at a time."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from components.metrics.append_only_file import AppendOnlyFile


class EventFile:
    """A new event file. torch's SummaryWriter writes from a thread, which ends at the first error with a traceback, and
    loses its buffer when the process is killed."""

    def __init__(self, directory: Path, run: str) -> None:
        """The name of the file ends in `run`, the identifier of the run."""
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        started = f"{now // 10**9:010d}.{now % 10**9:09d}"
        # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{started}.{socket.gethostname()}.{os.getpid()}.{run}"
        self._file = AppendOnlyFile(directory / name)
        self._append(file_version="brain.Event:2")

    def hide_from(self, step: int) -> None:
        """Hide what earlier files of the directory have from `step` on."""
        self._append(step=step, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, step: int, scalars: Iterable[tuple[str, float]]) -> None:
        """Add values by tag. Raises OSError if they could not be written yet."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
        self.add_summary(step, Summary(value=values))

    def add_summary(self, step: int, summary: Summary) -> None:
        self._append(step=step, summary=summary)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _append(self, **fields: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.append(record.getvalue())
