"""Step time and peak memory of every rank, by number of processes and parallel layout.

    python -m benchmarks.layouts [--repeats 2] [--steps 10] [--config my.toml] [--section.key=value ...]

Each run is started by ./run_train.sh, with one thread per process, on the CPU with gloo unless --run.device=cuda is
given. The layouts take turns and train on the same samples in the same steps. With more processes than cores the time
measures the sharing of cores, not the layout; the memory is valid nevertheless.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.shared import DEBUG, ROOT, machine, repeat_with, spread
from components.metrics.jsonl import read_rows

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "2 replicas": (2, ["--parallel.dp_replicate=2"]),
    "2 shards": (2, []),
    "2 TP shards": (2, ["--parallel.tp=2"]),
    "4 shards": (4, []),
    "2 replicas of 2 shards": (4, ["--parallel.dp_replicate=2"]),
    "2 shards of 2 TP shards": (4, ["--parallel.tp=2"]),
}
"""Name -> processes, arguments."""
WARM_UP = 3
BATCH = 8
SHAPE = {
    "model.dim": 512, "model.layers": 8, "model.heads": 8, "model.kv_heads": 8, "model.ffn_dim": 1536,
    "training.micro_batch_size": 2,
}  # fmt: skip
"""32M parameters, 0.5 GB with gradients and moments. The imports of a device mesh alone take about 0.1 GB."""


@dataclass
class Row:
    """The measurements of the runs of a layout."""

    step_seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    """MiB of each rank."""
    grown: list[float] = field(default_factory=list)
    """MiB of each rank above its memory before the model was built; this includes later imports."""
    failure: str = ""


def run(row: Row, processes: int, layout: list[str], arguments: argparse.Namespace, extra: list[str]) -> None:
    """Run a layout once and add its measurements to `row`."""
    with tempfile.TemporaryDirectory() as folder:
        peaks, directory = Path(folder) / "peaks", Path(folder) / "run"
        peaks.mkdir()
        settings = {
            "run.dir": directory, "run.device": "cpu", "training.precision": "float32", **SHAPE,
            "training.total_tokens": (arguments.steps + WARM_UP) * BATCH * arguments.sequence_length,
            "batch.use": "benchmarks.shared:PeakMemoryBatch", "batch.initial_size": BATCH, "batch.folder": peaks,
            "training.sequence_length": arguments.sequence_length, "lr_schedule.warmup_tokens": 0,
            "validation.interval_steps": "none", "validation.max_sequences": 1, "checkpoint.interval_steps": "none",
        }  # fmt: skip
        command = [ROOT / "run_train.sh", arguments.config, *(f"--{key}={value}" for key, value in settings.items())]
        environment = {"PYTHON": sys.executable, "NPROC": str(processes), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *layout, *extra], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            row.failure = f"failed ({done.returncode}): {lines[-1] if lines else ''}"
            return
        rows = read_rows(directory / "metrics.jsonl")
        row.step_seconds += [each["step_seconds"] for each in rows if "step_seconds" in each][WARM_UP:]
        for file in sorted(peaks.iterdir()):
            before, peak = map(int, file.read_text().split())
            row.peaks.append(peak / 2**20)
            row.grown.append((peak - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help=f"measured steps, after {WARM_UP} of warm-up")
    parser.add_argument("--sequence-length", type=int, default=128, help="in tokens")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--config", type=Path, default=DEBUG)
    arguments, extra = parser.parse_known_args()
    arguments.config = arguments.config.resolve()
    rows = {name: Row() for name in arguments.layouts}
    for _ in range(arguments.repeats):
        for name, row in rows.items():
            if not row.failure:
                run(row, *LAYOUTS[name], arguments, extra)
                print(f"{name}: {row.failure or 'measured'}", file=sys.stderr, flush=True)
    print(f"\n{machine()}, {os.cpu_count()} cores; {BATCH} x {arguments.sequence_length} tokens per step, ", end="")
    print(f"{arguments.steps} steps in each of {arguments.repeats} runs;")
    print("medians (lowest to highest), of steps and of ranks\n")
    print("| layout | processes | s per step | peak MiB of a rank | grown since its start |\n|---|---|---|---|---|")
    for name, row in rows.items():
        measured = [spread(row.step_seconds), spread(row.peaks, ",.0f"), spread(row.grown, ",.0f")]
        cells = [row.failure, "", ""] if row.failure else measured
        print(f"| {name} | {LAYOUTS[name][0]} | {' | '.join(cells)} |")
    print(repeat_with("benchmarks.layouts"))


if __name__ == "__main__":
    main()
