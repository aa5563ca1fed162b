"""The cost of measuring gradient noise: time of steps with and without it, and memory.

    python -m benchmarks.gradient_noise_cost [--steps 60] [--processes 1 2] [--section.key=value ...]

Every second step of a run measures; a pair is two neighboring steps, so that the varying speed of the machine cancels.
Memory is compared between a run that measures at every step and one that never does. Runs are on the CPU with gloo, one
thread per process, unless --run.device=cuda is given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.shared import DEBUG, ROOT, machine, quartiles, repeat_with, spread
from components.metrics.jsonl import read_rows

WARM_UP = 4
SHAPE = {
    "model.dim": 384, "model.layers": 6, "model.heads": 6, "model.kv_heads": 6, "model.ffn_dim": 1024,
    "training.micro_batch_size": 2, "training.sequence_length": 256, "batch.initial_size": 8,
}  # fmt: skip
"""14M parameters and a small micro-batch: the time of squaring gradients does not depend on the number of tokens."""


def run(processes: int, interval: str, steps: int, extra: list[str]) -> tuple[list[float], float]:
    """Return the seconds of every step after the warm-up, and the largest peak MiB of a rank."""
    with tempfile.TemporaryDirectory() as folder:
        peaks, directory = Path(folder) / "peaks", Path(folder) / "run"
        peaks.mkdir()
        settings = {
            "run.dir": directory, "run.device": "cpu", "training.precision": "float32", **SHAPE,
            "training.total_tokens": (steps + WARM_UP) * int(SHAPE["batch.initial_size"]) * 256,
            "batch.use": "benchmarks.shared:PeakMemoryBatch", "batch.folder": peaks,
            "lr_schedule.warmup_tokens": 0, "gradient_noise.interval_steps": interval,
            "validation.interval_steps": "none", "validation.max_sequences": 1, "checkpoint.interval_steps": "none",
        }  # fmt: skip
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        command = [str(ROOT / "run_train.sh"), str(DEBUG), *arguments, *extra]
        environment = {"PYTHON": sys.executable, "NPROC": str(processes), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = read_rows(directory / "metrics.jsonl")
        seconds = [row["step_seconds"] for row in rows if "step_seconds" in row][WARM_UP:]
        return seconds, max(int(file.read_text().split()[1]) for file in peaks.iterdir()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help=f"timed steps, after {WARM_UP} of warm-up")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments, extra = parser.parse_known_args()
    table = []
    for processes in arguments.processes:
        seconds, _ = run(processes, "2", arguments.steps, extra)
        on, off = seconds[0::2], seconds[1::2]  # steps 0, 2, ... measure, and so do those after an even warm-up
        pairs = [measured / plain - 1 for measured, plain in zip(on, off, strict=False)]
        memory = [run(processes, interval, 6, extra)[1] for interval in ("none", "1", "none", "1")]
        extra_time = quartiles(pairs, "+.2%")
        never, always = (f"{memory[first]:,.0f}, {memory[first + 2]:,.0f}" for first in (0, 1))
        table.append(f"| {processes} | {spread(off)} | {spread(on)} | {extra_time} | {never} | {always} |")
        print(f"{processes} processes: measured", file=sys.stderr, flush=True)
    print(f"\n{machine()}, {os.cpu_count()} cores; {arguments.steps} steps, medians (lowest to highest; quartiles of")
    print("the pairs); memory of two runs each\n")
    print("| processes | s per step, not measured | measured | of a pair | peak MiB of a rank, never | always |")
    print("|---|---|---|---|---|---|\n" + "\n".join(table))
    print(repeat_with("benchmarks.gradient_noise_cost"))


if __name__ == "__main__":
    main()
