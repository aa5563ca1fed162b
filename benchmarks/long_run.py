"""Measure whether the memory of a run grows with its length.

    python -m benchmarks.long_run [--steps 20000] [--save-every 500]

A tiny model trains with metrics, TensorBoard, gradient noise and checkpoints. The memory of the process is printed at
ten points, and its growth per thousand steps over the second half.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.shared import machine
from benchmarks.torture.kinds import make_recipe
from recipes.config import Override, load
from recipes.pretrain import Trainer

BATCH, LENGTH = 8, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--save-every", type=int, default=500)
    arguments = parser.parse_args()
    began = time.monotonic()
    points = measure(arguments.steps, arguments.save_every)
    print(f"\n{machine()}; {arguments.steps:,} steps in {time.monotonic() - began:.0f} s\n")
    print("| step | resident memory, MB |\n|---|---|")
    for step, resident in points:
        print(f"| {step:,} | {resident / 1e6:.1f} |")
    (first_step, first), (last_step, last) = points[len(points) // 2], points[-1]
    print(
        f"\ngrowth over the second half: {(last - first) / 1e3 / (last_step - first_step) * 1000:.1f} kB per 1000 steps"
    )


def measure(steps: int, save_every: int) -> list[tuple[int, int]]:
    """Return (step, resident bytes) at ten points."""
    process, points = psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        settings = {
            "run.dir": str(Path(folder) / "run"), "training.total_tokens": str(steps * BATCH * LENGTH),
            "metrics.writers.tensorboard.use": "components.metrics:TensorBoard",
            "metrics.writers.console.interval_steps": "100",
            "checkpoint.interval_steps": str(save_every),
        }  # fmt: skip
        config = load(make_recipe(Path(folder)), [Override(key, value) for key, value in settings.items()])
        run = Trainer(config, None, cleanup)
        write = run.metric_logger.log

        def after_step(row: dict[str, Any]) -> None:
            write(row)
            if row["step"] % (steps // 10) == 0:
                points.append((row["step"], process.memory_info().rss))

        run.metric_logger.log = after_step  # type: ignore[method-assign, assignment]
        run.train()
    return points


if __name__ == "__main__":
    main()
