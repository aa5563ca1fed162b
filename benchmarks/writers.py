"""Measure what each writer of metrics costs for a step.

    python -m benchmarks.writers

Rows of a training step go through the metric logger to one writer more than metrics.jsonl. `step` is the time that the
training loop spends on a row; `processor` is the time of all threads of the process, the thread of a background writer
included, until the last row is written. Both are above those of metrics.jsonl alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console as RichConsole

from benchmarks.shared import machine, spread
from components.metrics import Console, MLflow, TensorBoard, WandB
from components.metrics.logger import MetricsConfig
from components.metrics.writer import AnyWriter, RunInfo

ROW = {
    "tokens": 4096, "samples": 16, "epoch": 0.01, "loss": 3.5, "lr": 1e-3, "grad_norm": 0.7, "global_batch_size": 16,
    "requested_batch_size": 16, "micro_batches": 2, "noise_scale": 120.0, "noise_scale_over_batch": 7.5,
    "grad_cov_trace": 1.0, "grad_sq_norm": 0.1, "grad_cov_trace_ema": 1.0, "grad_sq_norm_ema": 0.1,
    "tokens_per_second": 2048.0, "step_seconds": 2.0, "data_seconds": 0.01, "mfu": 0.5, "memory_bytes": 10**8,
}  # fmt: skip
WRITERS: dict[str, tuple[str, Callable[[Path], AnyWriter]]] = {
    "Console": ("rich", lambda folder: Console()),
    "TensorBoard": ("tensorboard", lambda folder: TensorBoard()),
    "WandB, offline": ("wandb", lambda folder: WandB(project="benchmark", mode="offline")),
    "MLflow, sqlite": ("mlflow", lambda folder: MLflow(tracking_uri=f"sqlite:///{folder}/m.db", experiment="e")),
}
"""Name -> the library that it needs, and what makes it."""


def measure(make: Callable[[Path], AnyWriter] | None, rows: int) -> tuple[float, float]:
    """Return (seconds of the training loop, processor seconds) per row with one writer more than metrics.jsonl."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = RunInfo(
            name="benchmark",
            id="0123456789abcdef",
            directory=folder,
            metrics=folder / "metrics.jsonl",
            console=RichConsole(file=io.StringIO(), quiet=True),
            after_step=0,
            total_tokens=rows * 4096,
            recipe="",
            hyperparameters={},
            environment={},
        )
        writers: dict[str, AnyWriter | None] = {**MetricsConfig().writers, "console": None, "tensorboard": None}
        if make is not None:
            writers["measured"] = make(folder)
        logger = MetricsConfig(writers=writers).build(run, folder / "writers")
        processor, started = time.process_time(), time.perf_counter()
        for step in range(1, rows + 1):
            logger.log({"step": step, **ROW})
        in_loop = time.perf_counter() - started
        logger.close()
        return in_loop / rows, (time.process_time() - processor) / rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.writers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"{machine()}; {options.rows} rows, {options.repeats} times: median (smallest to largest), ms\n")
    print("| writer | step | processor |\n|---|---|---|")
    alone = [measure(None, options.rows) for _ in range(options.repeats)]
    base = [sorted(values)[len(alone) // 2] for values in zip(*alone, strict=True)]
    print(_line("JsonLines", alone, [0.0, 0.0]))
    for name, (library, make) in WRITERS.items():
        if importlib.util.find_spec(library) is not None:
            print(_line(name, [measure(make, options.rows) for _ in range(options.repeats)], base))
    return 0


def _line(name: str, measured: Sequence[tuple[float, float]], base: Sequence[float]) -> str:
    cells = [
        spread([1000 * (value - below) for value in values], ".2f")
        for values, below in zip(zip(*measured, strict=True), base, strict=True)
    ]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
