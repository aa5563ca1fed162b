"""TensorBoard event files with the metrics of metrics.jsonl, in groups of tags."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from components.metrics.writer import Row, RunInfo, Writer

_NOISE = (
    "noise_scale",
    "noise_scale_over_batch",
    "grad_cov_trace",
    "grad_sq_norm",
    "grad_cov_trace_ema",
    "grad_sq_norm_ema",
)
TAG_GROUPS = {
    "train": ("loss", "grad_norm", "epoch"),
    "lr": ("lr",),
    "batch": (
        "global_batch_size",
        "requested_batch_size",
        "micro_batches",
        *_NOISE,
        *(f"{name}_adam" for name in _NOISE),
    ),
    "experts": ("load_balancing_loss", "router_z_loss", "router_entropy", "expert_load_max", "expert_load_min"),
    "throughput": ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes"),
    "validation": ("val_loss", "val_perplexity", "val_bits_per_byte"),  # and each of them with _average_NAME
}

_TAGS = {name: f"{group}/{name}" for group, names in TAG_GROUPS.items() for name in names}
_PREFIXES = {"goodput_": "batch", "probe_": "probes", "task_": "tasks"}
"""The groups of metrics whose names begin so."""
_COUNTERS = ("step", "tokens", "samples")
"""The position of a row, which is not written as a metric."""


@dataclass(kw_only=True)
class TensorBoard(Writer):
    """Writes rows as scalars over steps; a resumed run hides what the interrupted run wrote after the checkpoint.

    Each start of a run has a new event file, with one event per row.
    """

    in_background = False

    def open(self, run: RunInfo) -> None:
        # importing them takes half a second, which a run without TensorBoard does not need
        from components.metrics.tensorboard_events import EventFile
        from components.metrics.tensorboard_layout import run_summaries

        directory = run.directory / "tensorboard"
        is_first = not any(directory.glob(f"events.out.tfevents.*.{run.id}"))
        self._file = EventFile(directory, run.id)
        if run.after_step:
            self._file.hide_from(run.after_step + 1)
        at_start, self._end = run_summaries(run)
        if is_first:
            for summary in at_start:
                self._file.add_summary(run.after_step, summary)
        self._step = run.after_step

    def write(self, row: Row) -> None:
        """Write a row. Raises OSError if it could not be written yet."""
        self._step = row["step"]
        self._file.add_scalars(self._step, scalars(row))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.add_summary(self._step, self._end)
        self._file.close()


def scalars(row: Row) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of every finite number of a row; those of a nested table under its name.

    Metrics that TAG_GROUPS does not list, such as those of a custom model or hook, are in the group `train`; those of
    the Goodput batch policy, of probes and of tasks, whose names begin as in `_PREFIXES`, are in the groups there.
    """
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"train/{name}/{key}", each) for key, each in value.items() if _is_finite(each))
        elif name not in _COUNTERS and _is_finite(value):
            other = next((group for prefix, group in _PREFIXES.items() if name.startswith(prefix)), "train")
            group = _TAGS.get(name.partition("_average_")[0], f"{other}/").partition("/")[0]
            yield f"{group}/{name}", value


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
