"""What float8 changes: the loss of the debug recipe, and the gradient noise that a batch policy sees.

    python -m benchmarks.float8 [--tokens 200K] [--seeds 3] [--precision float32]

Each seed is trained without float8, with "rowwise" and with "tensorwise", on the same samples. On a CPU float8 is
emulated: the rounding is that of a GPU, the speed is not. The table has the relative difference of the training loss at
the same step, as the mean of its magnitude over the second half of the run and the largest of any step, and the ratio
of the gradient's covariance trace (S) and squared norm, as geometric means over steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shared import DEBUG, ROOT, machine, repeat_with, spread
from components.metrics.jsonl import read_rows

KINDS = ("off", "rowwise", "tensorwise")


def train(kind: str, seed: int, tokens: str, precision: str, extra: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the steps of a run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.dir": Path(folder) / "run", "run.seed": seed, "training.float8": kind, "training.total_tokens": tokens,
            "training.precision": precision, "lr_schedule.warmup_tokens": 0, "gradient_noise.interval_steps": 1,
            "validation.max_sequences": 1, "checkpoint.interval_steps": "none",
        }  # fmt: skip
        command: list[Any] = [ROOT / "run_train.sh", DEBUG, *(f"--{key}={value}" for key, value in settings.items())]
        subprocess.run([*command, *extra], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return [row for row in read_rows(Path(folder) / "run" / "metrics.jsonl") if "loss" in row]


def mean_ratio(rows: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> float:
    """Return the geometric mean over steps of the ratio of a positive number."""
    logs = [
        math.log(row[key] / before[key])
        for row, before in zip(rows, base, strict=True)
        if min(row[key], before[key]) > 0
    ]
    return math.exp(statistics.fmean(logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="200K")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    arguments, extra = parser.parse_known_args()
    found: dict[str, list[tuple[float, float, float, float]]] = {kind: [] for kind in KINDS[1:]}
    for seed in range(arguments.seeds):
        base, *others = (train(kind, seed, arguments.tokens, arguments.precision, extra) for kind in KINDS)
        for kind, rows in zip(KINDS[1:], others, strict=True):
            differences = [abs(row["loss"] / before["loss"] - 1) for row, before in zip(rows, base, strict=True)]
            half = statistics.fmean(differences[len(differences) // 2 :])
            noise, signal = (mean_ratio(rows, base, key) for key in ("grad_cov_trace", "grad_sq_norm"))
            found[kind].append((half, max(differences), noise, signal))
            print(f"seed {seed}, {kind}: done", file=sys.stderr, flush=True)
    print(f"{machine()}; {arguments.tokens} tokens, {arguments.precision}, {arguments.seeds} seeds\n")
    print("| float8 | loss, second half | largest difference | S, ratio | squared norm, ratio |\n|---|---|---|---|---|")
    for kind, results in found.items():
        columns = zip(zip(*results, strict=True), (".2%", ".2%", ".3f", ".3f"), strict=True)
        cells = [spread(column, form) for column, form in columns]
        print(f"| {kind} | {' | '.join(cells)} |")
    print(repeat_with("benchmarks.float8"))


if __name__ == "__main__":
    main()
