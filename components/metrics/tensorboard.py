"""TensorBoard event files with the metrics of metrics.jsonl, in groups of tags."""

from __future__ import annotations

import io
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from components.metrics.append_only_file import AppendOnlyFile

TAG_GROUPS = {
    "train": ("loss", "grad_norm", "epoch"),
    "lr": ("lr",),
    "batch": (
        "global_batch_size",
        "requested_batch_size",
        "micro_batches",
        "noise_scale",
        "noise_scale_over_batch",
        "grad_cov_trace",
        "grad_sq_norm",
        "grad_cov_trace_ema",
        "grad_sq_norm_ema",
    ),
    "experts": ("load_balancing_loss", "router_z_loss", "router_entropy", "expert_load_max", "expert_load_min"),
    "throughput": ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes"),
    "validation": ("val_loss", "val_perplexity", "val_bits_per_byte"),  # and each of them with _average_NAME
}

_TAGS = {name: f"{group}/{name}" for group, names in TAG_GROUPS.items() for name in names}
_COUNTERS = ("step", "tokens", "samples")
"""The position of a row, which is not written as a metric."""


class TensorBoardWriter:
    """Writes rows as scalars over steps; a resumed run hides what the interrupted run wrote after the checkpoint.

    Each start of a run has a new event file, with one event per row. torch's SummaryWriter writes from a thread, which
    ends at the first error with a traceback, and loses its buffer when the process is killed.
    """

    def __init__(self, directory: Path, *, after_step: int = 0, run: str = "") -> None:
        """File names end in `run`, the identifier of the run."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}.{socket.gethostname()}.{os.getpid()}.{run}"
        self._file = AppendOnlyFile(directory / name)  # TensorBoard reads files in the order of their names
        self._append(Event(wall_time=now / 1e9, file_version="brain.Event:2"))
        if after_step:
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=now / 1e9, step=after_step + 1, session_log=start))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row. Raises OSError if it could not be written yet."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        self._append(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __str__(self) -> str:
        return str(self._directory)

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of every finite number of a row; those of a nested table under its name.

    Metrics that TAG_GROUPS does not list, such as those of a custom model or hook, are in the group `train`, and those
    of tasks, task_NAME_METRIC, in `tasks`.
    """
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"train/{name}/{key}", each) for key, each in value.items() if _is_finite(each))
        elif name not in _COUNTERS and _is_finite(value):
            group = _TAGS.get(name.partition("_average_")[0], "train/").partition("/")[0]
            group = "tasks" if name.startswith("task_") else group
            yield f"{group}/{name}", value


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
