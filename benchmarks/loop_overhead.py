"""The fraction of step time outside forward, backward and optimizer.

    python -m benchmarks.loop_overhead [--repeats 5] [--steps 40]

The debug recipe runs unchanged, with TensorBoard and metrics.jsonl. Forward, backward and optimizer are wrapped and
timed; a step is timed from its start to the next. The rest is data, clipping, metrics and the loop.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.measure import DEBUG, machine, spread
from recipes.config import Override, load
from recipes.pretrain import Trainer

WARM_UP = 5


class Timed:
    """Adds up the seconds spent in the callables it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def measure_overhead(steps: int) -> tuple[float, float]:
    """Return (overhead, clipping) as fractions of step time."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as cleanup:
        settings = {
            "run.dir": directory, "batch.use": "benchmarks.measure:StopwatchBatch", "batch.initial_size": "16",
            "validation.interval_steps": "none", "checkpoint.interval_steps": "none",
            "validation.max_sequences": "1", "lr_schedule.warmup_tokens": "0",
            "training.total_tokens": str((steps + WARM_UP + 1) * 16 * 256),
        }  # fmt: skip
        config = load(DEBUG, [Override(key, value) for key, value in settings.items()])
        run = Trainer(config, None, cleanup)
        work, clip = Timed(), Timed()
        cleanup.callback(setattr, torch.Tensor, "backward", torch.Tensor.backward)
        torch.Tensor.backward = work.wrap(torch.Tensor.backward)  # type: ignore[method-assign]
        run.model.forward = work.wrap(run.model.forward)
        run.step.optimizer.step = work.wrap(run.step.optimizer.step)  # type: ignore[method-assign]
        run.step._clip = clip.wrap(run.step._clip)  # type: ignore[method-assign]

        marks: list[tuple[float, float]] = []
        next_batch_size = run.policy.next_batch_size

        def marked(progress: Any) -> int:
            marks.append((work.seconds, clip.seconds))
            return next_batch_size(progress)

        object.__setattr__(run.policy, "next_batch_size", marked)
        run.train()
        seconds = sum(config.recipe.batch.step_seconds(skip=WARM_UP))
        worked, clipped = (marks[-1][i] - marks[WARM_UP][i] for i in (0, 1))
        return 1 - worked / seconds, clipped / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    fractions = [measure_overhead(arguments.steps) for _ in range(arguments.repeats)]
    print(f"\n{machine()}; debug recipe, {arguments.steps} steps, {arguments.repeats} runs")
    print(f"not forward, backward or optimizer: {spread([100 * a for a, _ in fractions])} % of step time")
    print(f"  of which gradient clipping:       {spread([100 * c for _, c in fractions])} %")


if __name__ == "__main__":
    main()
