"""Kill runs at random instants, restart them, and check that nothing was lost.

    python -m benchmarks.torture [--kills 1000] [--jobs 2] [--seed 0] [--folder DIRECTORY]

Each life is a run of one of the kinds in kinds.py, of one to four processes, that gets SIGKILL up to ten times: while
it starts, resumes or downloads its checkpoint, at any time, during a save, an upload, a write of metrics or a
validation, or while it stops after SIGTERM. Of several processes one or all are killed. The run is continued with
--resume, sometimes after its directory was removed, if its checkpoints are remote too. It must end bitwise equal to an
uninterrupted run, or with losses within 1e-5 if the number of processes changes (comparison.py).
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

from benchmarks.shared import machine, repeat_with
from benchmarks.torture.comparison import Difference, compare
from benchmarks.torture.killed_run import KilledRun, Life, Pace
from benchmarks.torture.kinds import KINDS, Kind, import_for, make_recipe, remote_folder

KILLS_PER_LIFE = 10


@dataclass(frozen=True)
class Outcome:
    """A run that was killed, and how it ended."""

    kind: Kind
    life: Life
    difference: Difference = field(default_factory=Difference)
    failure: str = ""
    """In what it differs from an uninterrupted run, if it is more than it may."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="directory that keeps the runs (default: a temporary one)")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    outcomes = torture(folder, arguments.kills, arguments.jobs, arguments.seed)
    print_tables(outcomes)
    print(f"\n{machine()}; {time.monotonic() - started:.0f} s, {arguments.jobs} runs at a time")
    print(repeat_with("benchmarks.torture"))
    if failures := [outcome.failure for outcome in outcomes if outcome.failure]:
        raise SystemExit("\n".join(["", f"{len(failures)} runs failed:", *failures]))
    if arguments.folder is None:
        shutil.rmtree(folder)  # after a failure it is kept


def torture(folder: Path, kills: int, jobs: int, seed: int) -> list[Outcome]:
    """Run lives until `kills` is reached."""
    recipes = {kind: make_recipe(folder, kind) for kind in KINDS}
    for recipe in recipes.values():
        import_for(recipe)
    outcomes: list[Outcome] = []
    running: dict[Future[Outcome], int] = {}
    numbers = count()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        paces = list(pool.map(_measure, recipes.values(), [folder] * len(KINDS), KINDS))
        done = 0
        while done < kills or running:
            while len(running) < jobs and (left := kills - done - sum(running.values())) > 0:
                number, planned = next(numbers), min(left, KILLS_PER_LIFE)
                kind = KINDS[number % len(KINDS)]
                pace = paces[number % len(KINDS)]
                running[pool.submit(_live, recipes[kind], folder, kind, pace, planned, number, seed)] = planned
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                outcomes.append(outcome := future.result())
                killed = outcome.life.killed.total()
                done += killed
                print(f"{done} kills, {outcome.kind}: {killed}; {outcome.failure or outcome.difference}", flush=True)
    return outcomes


def _measure(recipe: Path, folder: Path, kind: Kind) -> Pace:
    return KilledRun(recipe, _uninterrupted(folder, kind), kind, random.Random(0)).measure()


def _live(recipe: Path, folder: Path, kind: Kind, pace: Pace, kills: int, number: int, seed: int) -> Outcome:
    directory = folder / f"life-{number:05d}"
    run = KilledRun(recipe, directory, kind, random.Random(f"{seed} {number}"), pace)
    remote = remote_folder(folder) / directory.name if kind.remote else None
    try:
        run.finish(kills)
        return Outcome(kind, run.life, compare(directory, _uninterrupted(folder, kind), kind, remote))
    except (AssertionError, ValueError) as error:  # ValueError: a damaged checkpoint or metrics.jsonl
        return Outcome(kind, run.life, failure=f"{directory}: {error}")


def _uninterrupted(folder: Path, kind: Kind) -> Path:
    return folder / f"uninterrupted-{KINDS.index(kind)}"


def print_tables(outcomes: list[Outcome]) -> None:
    """Print a table by kind of moment and one by kind of run."""
    by_moment: dict[str, list[Life]] = {}
    killed = sum((outcome.life.killed for outcome in outcomes), Counter[str]())
    for outcome in outcomes:
        for moment in outcome.life.killed:
            by_moment.setdefault(moment, []).append(outcome.life)
    print("\n| SIGKILL | kills | runs |\n|---|---|---|")
    for moment, kills in killed.most_common():
        print(f"| {moment} | {kills} | {len(by_moment[moment])} |")
    stopped, lost = (sum(getattr(outcome.life, name) for outcome in outcomes) for name in ("stopped", "lost"))
    print(f"| all | {killed.total()} | {len(outcomes)} |\n")
    print(f"{stopped} times a run saved and stopped after SIGTERM, {lost} times its directory was removed.\n")
    print("| kind of run | runs | kills | largest difference of a loss | of a tensor |\n|---|---|---|---|---|")
    for kind in KINDS:
        lives = [outcome for outcome in outcomes if outcome.kind == kind]
        kills = sum(outcome.life.killed.total() for outcome in lives)
        loss, tensor = (
            max((getattr(outcome.difference, name) for outcome in lives), default=0.0) for name in ("loss", "tensor")
        )
        print(f"| {kind} | {len(lives)} | {kills} | {loss:.1e} | {tensor:.1e} |")


if __name__ == "__main__":
    main()
