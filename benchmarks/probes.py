"""The cost of each probe: time of steps with and without it, and memory.

    python -m benchmarks.probes [--steps 16] [--processes 1] [--section.key=value ...]

Every second step of a run is probed. The time of the probes is compared with the rest of the same step, so that the
varying speed of the machine cancels. Memory is the peak of a run with the probe, minus that of one without. Runs are on
the CPU with gloo, one thread per process, unless --run.device=cuda is given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.shared import DEBUG, ROOT, machine, repeat_with, spread
from components.metrics.jsonl import read_rows

WARM_UP = 4
BATCH, SEQUENCE = 32, 128
SHAPE = {
    "model.dim": 192, "model.layers": 4, "model.heads": 4, "model.kv_heads": 4, "model.ffn_dim": 512,
    "training.micro_batch_size": 4, "training.sequence_length": SEQUENCE, "batch.initial_size": BATCH,
}  # fmt: skip
"""3.3M parameters. The sample of 8 sequences is a quarter of the batch."""
PROBES = ("Norms", "Activations", "AttentionLogits", "LayerNoise")
CASES = {"none": (), **{name: (name,) for name in PROBES}, "all four": PROBES}


def run(processes: int, probes: tuple[str, ...], steps: int, extra: list[str]) -> tuple[list[dict], float]:
    """Return the rows of the steps after the warm-up, every second one probed, and the largest peak MiB of a rank."""
    with tempfile.TemporaryDirectory() as folder:
        peaks, directory = Path(folder) / "peaks", Path(folder) / "run"
        peaks.mkdir()
        settings = {
            "run.dir": directory, "run.device": "cpu", "training.precision": "float32", **SHAPE,
            "training.total_tokens": (steps + WARM_UP) * BATCH * SEQUENCE, "lr_schedule.warmup_tokens": 0,
            "batch.use": "benchmarks.shared:PeakMemoryBatch", "batch.folder": peaks,
            "validation.interval_steps": "none", "validation.max_sequences": 1, "checkpoint.interval_steps": "none",
        }  # fmt: skip
        for name in probes:
            settings[f"probes.{name}.use"] = f"components.probes:{name}"
            settings[f"probes.{name}.interval_steps"] = 2
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        command = [str(ROOT / "run_train.sh"), str(DEBUG), *arguments, *extra]
        environment = {"PYTHON": sys.executable, "NPROC": str(processes), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [row for row in read_rows(directory / "metrics.jsonl") if "step_seconds" in row][WARM_UP:]
        return rows, max(int(file.read_text().split()[1]) for file in peaks.iterdir()) / 2**20


def report(name: str, rows: list[dict], peak: float, peak_without: float) -> str:
    """Return the row of the table for a case."""
    plain = [row["step_seconds"] for row in rows if "probe_seconds" not in row]
    if len(plain) == len(rows):
        return f"| {name} | {spread(plain)} | | | | |"
    probed = [row for row in rows if "probe_seconds" in row]
    own = [row["probe_seconds"] for row in probed]
    shares = [row["probe_seconds"] / (row["step_seconds"] - row["probe_seconds"]) for row in probed]
    return (
        f"| {name} | {spread(plain)} | {spread(own, '.2g')} | {spread(shares, '.1%')} | "
        f"{statistics.median(shares) / 100:.2%} | {peak - peak_without:+,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=16, help=f"timed steps, after {WARM_UP} of warm-up; an even number"
    )
    parser.add_argument("--processes", type=int, default=1)
    arguments, extra = parser.parse_known_args()
    table, without = [], 0.0
    for name, probes in CASES.items():
        rows, peak = run(arguments.processes, probes, arguments.steps, extra)
        without = without or peak
        table.append(report(name, rows, peak, without))
        print(f"{name}: measured", file=sys.stderr, flush=True)
    print(f"\n{machine()}, {os.cpu_count()} cores, {arguments.processes} processes; {arguments.steps} steps, medians")
    print("(lowest to highest)\n")
    print("| probe | s of a step without it | probe_seconds | of a measured step | at interval 100 | peak MiB |")
    print("|---|---|---|---|---|---|\n" + "\n".join(table))
    print(repeat_with("benchmarks.probes"))


if __name__ == "__main__":
    main()
