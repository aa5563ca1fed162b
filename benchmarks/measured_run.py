"""Runs of the launcher that measure the seconds of their steps and the peak memory of every rank."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shared import ROOT, spread
from components.metrics.jsonl import read_rows


@dataclass
class Measurements:
    """Those of the runs of one row of a table."""

    step_seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    """MiB of each rank."""
    grown: list[float] = field(default_factory=list)
    """MiB of each rank above its memory before the model was built; this includes later imports."""
    failure: str = ""

    def cells(self) -> list[str]:
        """Return the cells of a table: seconds of a step, peak, and what it has grown, or the failure."""
        if self.failure:
            return [self.failure, "", ""]
        return [spread(self.step_seconds), spread(self.peaks, ",.0f"), spread(self.grown, ",.0f")]


def measure_run(
    found: Measurements, processes: int, recipe: Path, settings: Mapping[str, Any], extra: Sequence[str], *,
    batch: int, steps: int, warm_up: int, sequence_length: int,
) -> None:  # fmt: skip
    """Run `recipe` on `processes` processes of one thread, and add to `found` its steps after `warm_up`.

    `settings` and the arguments `extra` are keys of the recipe; the run trains on a constant batch, on the CPU unless
    they say otherwise, and saves nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        peaks, directory = Path(folder) / "peaks", Path(folder) / "run"
        peaks.mkdir()
        keys = {
            "run.dir": directory, "run.device": "cpu", "training.precision": "float32", **settings,
            "training.total_tokens": (steps + warm_up) * batch * sequence_length,
            "batch.use": "benchmarks.shared:PeakMemoryBatch", "batch.initial_size": batch, "batch.folder": peaks,
            "training.sequence_length": sequence_length, "lr_schedule.warmup_tokens": 0,
            "checkpoint.interval_steps": "none",
        }  # fmt: skip
        command: list[Any] = [
            ROOT / "run_train.sh",
            recipe,
            *(f"--{key}={value}" for key, value in keys.items()),
            *extra,
        ]
        environment = {"PYTHON": sys.executable, "NPROC": str(processes), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            found.failure = f"failed ({done.returncode}): {' '.join(line.strip() for line in lines[-3:])}"
            return
        rows = read_rows(directory / "metrics.jsonl")
        found.step_seconds += [each["step_seconds"] for each in rows if "step_seconds" in each][warm_up:]
        for file in sorted(peaks.iterdir()):
            before, peak = map(int, file.read_text().split())
            found.peaks.append(peak / 2**20)
            found.grown.append((peak - before) / 2**20)
