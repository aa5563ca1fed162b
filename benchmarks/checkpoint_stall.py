"""Seconds for which a checkpoint stops training: on disk and in memory, synchronous and asynchronous.

    python -m benchmarks.checkpoint_stall [--repeats 3] [--saves 8] [--config my.toml] [--section.key=value ...]
    torchrun --nproc-per-node=2 -m benchmarks.checkpoint_stall ...      # each process counts as a node

Runs of the recipe (default: debug) with and without `checkpoint.async_save` take turns and save every few steps. The
stall is the time that the loop spends in `save()`, except the first, which allocates buffers. The cost of an
asynchronous save while it is written is seen in the median step after a save, compared with that of a run that does not
save.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from benchmarks.shared import DEBUG, machine, spread
from components.checkpoint.host_memory import make_host_memory_directory
from recipes.config import Override, load
from recipes.pretrain import Trainer

WARM_UP = 3
STEPS_BETWEEN = 4
"""Steps between two saves."""


@dataclass
class Measured:
    """A run: seconds of each `save()`, seconds of each step after one, bytes of a checkpoint."""

    stalls: list[float]
    next_steps: list[float]
    size: int


def measure(
    config_path: Path,
    extra: list[Override],
    saves: int,
    *,
    asynchronous: bool,
    saving: bool = True,
    in_memory: bool = False,
) -> Measured:
    """Train until `saves` checkpoints after the first are written."""
    with tempfile.TemporaryDirectory() as own, ExitStack() as cleanup:
        directory = _of_first_rank(own)
        if in_memory:
            cleanup.enter_context(make_host_memory_directory())
        batch, steps = 8 * int(os.environ.get("WORLD_SIZE", "1")), WARM_UP + STEPS_BETWEEN * (saves + 1) + 1
        settings = {
            "run.dir": directory, "batch.use": "benchmarks.shared:StopwatchBatch", "batch.initial_size": str(batch),
            "validation.interval_steps": "none", "checkpoint.interval_steps": "none", "checkpoint.keep_last": "2",
            "checkpoint.async_save": str(asynchronous).lower(),
            "checkpoint.in_memory_interval_steps": "1000" if in_memory else "none", "lr_schedule.warmup_tokens": "0",
        }  # fmt: skip
        overrides = [*(Override(key, value) for key, value in settings.items()), *extra]
        length = load(config_path, overrides).recipe.training.sequence_length
        config = load(config_path, [*overrides, Override("training.total_tokens", str(steps * batch * length))])
        run = Trainer(config, None, cleanup)
        stalls, next_steps = [], []
        write = run.metric_logger.log

        def after_step(row: dict) -> None:
            write(row)
            step = row["step"]
            if step <= WARM_UP or run.clock.done:
                return
            if (step - WARM_UP) % STEPS_BETWEEN == 1:
                next_steps.append(row["step_seconds"])
            if saving and (step - WARM_UP) % STEPS_BETWEEN == 0:
                start = time.perf_counter()
                run.checkpoints.save_in_memory() if in_memory else run.checkpoints.save()
                stalls.append(time.perf_counter() - start)

        run.metric_logger.log = after_step  # type: ignore[method-assign, assignment]
        run.train()
        store = run.checkpoints.manager
        store.wait()
        newest = store.latest()
        size = sum(file.stat().st_size for file in newest.rglob("*")) if newest else 0
        return Measured(stalls[1:], next_steps[2:], size)


def _of_first_rank(path: str) -> str:
    """Return the `path` of rank 0, on every rank."""
    paths = [path]
    if dist.is_initialized():
        dist.broadcast_object_list(paths, src=0)
    return paths[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--config", type=Path, default=DEBUG)
    arguments, rest = parser.parse_known_args()
    extra = [Override(*override.removeprefix("--").split("=", 1)) for override in rest]
    kinds = {
        "no checkpoint": {"asynchronous": False, "saving": False},
        "synchronous": {"asynchronous": False},
        "asynchronous": {"asynchronous": True},
        "in memory": {"asynchronous": False, "in_memory": True},
        "in memory, asynchronous": {"asynchronous": True, "in_memory": True},
    }
    if several := int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        dist.init_process_group("gloo")  # once for all runs
    runs: dict[str, list[Measured]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):
        for kind, how in kinds.items():
            runs[kind].append(measure(arguments.config, extra, arguments.saves, **how))
    if several and dist.get_rank():
        return
    size = runs["synchronous"][0].size / 2**20
    print(f"\n{machine()}; {arguments.config.name}, checkpoint of {size:.1f} MiB, ", end="")
    print(f"{arguments.saves} saves in each of {arguments.repeats} runs; median (lowest to highest)\n")
    print("| | stall, seconds | step after it, seconds |\n|---|---|---|")
    for kind, measured in runs.items():
        stalls = [second for run in measured for second in run.stalls]
        steps = [second for run in measured for second in run.next_steps]
        print(f"| {kind} | {spread(stalls) if stalls else '0'} | {spread(steps)} |")
    stall = {kind: statistics.median(s for run in runs[kind] for s in run.stalls) for kind in list(kinds)[1:3]}
    print(f"\nThe loop waits {stall['synchronous'] / stall['asynchronous']:.1f} times less. Repeat with:\n")
    print(f"    python -m benchmarks.checkpoint_stall {' '.join(sys.argv[1:])}".rstrip())


if __name__ == "__main__":
    main()
