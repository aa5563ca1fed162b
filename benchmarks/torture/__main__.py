"""Kill a real run at random instants, start it again, and see that nothing was lost. Can be left running.

    python -m benchmarks.torture [--kills 200] [--seed 0] [--folder DIRECTORY]

Each life is a run of 60 steps on one process or two, saving synchronously or not, that SIGKILL meets several times:
while it starts, at any moment, in a save, in a write of its metrics; on two processes one of them or both. It is always
continued with --resume. What it ends with must be bitwise what the same run left in peace ends with: parameters,
optimizer, random state, and a line of metrics for each step; and its directory must hold nothing else.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.torture.lives import Kind, Tally, compare, live, make_recipe

KINDS = [Kind(ranks, async_save) for ranks in (1, 2) for async_save in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are, and stay (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        torture(arguments.folder or Path(temporary), arguments.kills, random.Random(arguments.seed))


def torture(folder: Path, kills: int, chance: random.Random) -> None:
    """Raises AssertionError at the first life that did not end as it should."""
    recipe, tally, began = make_recipe(folder), Tally(), time.monotonic()
    peaceful = {kind: folder / f"peaceful-{number}" for number, kind in enumerate(KINDS)}
    for kind, directory in peaceful.items():
        live(recipe, directory, kind, 0, chance, Tally())
    while (done := tally.kills.total()) < kills:
        kind = KINDS[tally.lives % len(KINDS)]
        directory = folder / f"life-{tally.lives:05d}"
        live(recipe, directory, kind, min(kills - done, 12), chance, tally)
        compare(directory, peaceful[kind])
        print(f"life {tally.lives}: {kind}; {tally.kills.total() - done} kills survived", flush=True)
    instants = ", ".join(f"{count} {instant}" for instant, count in sorted(tally.kills.items()))
    print(f"{tally.kills.total()} kills ({instants}) in {tally.lives} lives, {time.monotonic() - began:.0f} s: no loss")


if __name__ == "__main__":
    main()
