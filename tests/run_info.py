"""What the writers of metrics see of a run, for tests of writers without one."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from components.metrics.jsonl import JsonLines
from components.metrics.writer import RunInfo

WITH_TENSORBOARD = "--metrics.writers.tensorboard.use=components.metrics:TensorBoard"


def run_info(directory: Path, **changes) -> RunInfo:
    run = RunInfo(
        name="test",
        id="0123456789abcdef",
        directory=directory,
        metrics=directory / "metrics.jsonl",
        console=Console(file=io.StringIO()),
        after_step=0,
        total_tokens=10_000,
        recipe="[model]\ndim = 64\n",
        hyperparameters={"model.dim": 64, "optimizer.use": "components.optimizers:AdamW", "batch.stages": [1, 2]},
        environment={"git_commit": "abc", "git_dirty": True, "torch": "2.13.0"},
    )
    return replace(run, **changes)


def open_jsonl(path: Path, after_step: int = 0) -> JsonLines:
    writer = JsonLines()
    writer.open(run_info(path.parent, metrics=path, after_step=after_step))
    return writer
