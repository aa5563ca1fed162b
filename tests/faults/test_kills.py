"""SIGKILL at random instants: a short form of `python -m benchmarks.torture`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import run_process

ROOT = Path(__file__).resolve().parents[2]

HANDFUL = """
import random, sys
from pathlib import Path
import torch
from benchmarks.torture.killed_run import Kind, Tally, compare, make_recipe, run_life

torch.set_num_threads(1)
folder, kind, tally = Path(sys.argv[1]), Kind(int(sys.argv[2]), sys.argv[3] == "async"), Tally()
recipe = make_recipe(folder)
run_life(recipe, folder / "peaceful", kind, 0, random.Random(0), Tally())
run_life(recipe, folder / "killed", kind, 3, random.Random(int(sys.argv[4])), tally)
compare(folder / "killed", folder / "peaceful")
print(tally.kills.total(), "kills")
"""


@pytest.mark.parametrize(("ranks", "saves", "seed"), [("1", "async", "1"), ("2", "sync", "2")])
def test_a_run_that_is_killed_again_and_again_ends_bitwise_as_an_uninterrupted_one(
    tmp_path, ranks, saves, seed
) -> None:
    # whose first process has computed nothing, so that it can be forked
    done = run_process([sys.executable, "-c", HANDFUL, tmp_path, ranks, saves, seed], cwd=ROOT)
    said = "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + said
    assert int(done.stdout.split()[0]) >= 1, "it was killed"
