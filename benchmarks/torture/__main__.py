"""Kill a run at random instants, restart it, and check that nothing was lost.

    python -m benchmarks.torture [--kills 200] [--seed 0] [--folder DIRECTORY]

Each life is a run of 60 steps on one or two processes, with synchronous or asynchronous saves, which gets SIGKILL
several times: while it starts, at any time, during a save, or while it writes metrics; of two processes one or both are
killed. It is continued with --resume. It must end bitwise equal to an uninterrupted run: parameters, optimizer, random
state, a line of metrics for each step, and no other files in its directory.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.torture.killed_run import Kind, Tally, compare, make_recipe, run_life

KINDS = [Kind(ranks, async_save) for ranks in (1, 2) for async_save in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="directory that keeps the runs (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        torture(arguments.folder or Path(temporary), arguments.kills, random.Random(arguments.seed))


def torture(folder: Path, kills: int, rng: random.Random) -> None:
    """Run lives until `kills` is reached. Raises AssertionError at the first one that ends differently."""
    recipe, tally, started = make_recipe(folder), Tally(), time.monotonic()
    uninterrupted = {kind: folder / f"uninterrupted-{number}" for number, kind in enumerate(KINDS)}
    for kind, directory in uninterrupted.items():
        run_life(recipe, directory, kind, 0, rng, Tally())
    while (done := tally.kills.total()) < kills:
        kind = KINDS[tally.lives % len(KINDS)]
        directory = folder / f"life-{tally.lives:05d}"
        run_life(recipe, directory, kind, min(kills - done, 12), rng, tally)
        compare(directory, uninterrupted[kind])
        print(f"life {tally.lives}: {kind}; {tally.kills.total() - done} kills survived", flush=True)
    instants = ", ".join(f"{count} {instant}" for instant, count in sorted(tally.kills.items()))
    print(
        f"{tally.kills.total()} kills ({instants}) in {tally.lives} lives, {time.monotonic() - started:.0f} s: no loss"
    )


if __name__ == "__main__":
    main()
