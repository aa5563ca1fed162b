"""SIGKILL at random instants: a short form of `python -m benchmarks.torture`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import run_process

ROOT = Path(__file__).resolve().parents[2]

HANDFUL = """
import sys
from pathlib import Path
from random import Random
import torch
from benchmarks.torture.comparison import compare
from benchmarks.torture.killed_run import KilledRun
from benchmarks.torture.kinds import KINDS, import_for, make_recipe

torch.set_num_threads(1)
folder, seed = Path(sys.argv[1]), int(sys.argv[3])
kind = next(kind for kind in KINDS if kind.name == sys.argv[2])
recipe = make_recipe(folder, kind)
import_for(recipe)
pace = KilledRun(recipe, folder / "uninterrupted", kind, Random(0)).measure()
killed = KilledRun(recipe, folder / "killed", kind, Random(seed), pace)
killed.finish(3)
compare(folder / "killed", folder / "uninterrupted", kind)
print(killed.life.killed.total(), "kills")
"""


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("experts, NormTest, average, 1 process", "1"), ("AdamW, constant batch, 2 processes, asynchronous saves", "2")],
)
def test_a_run_that_is_killed_again_and_again_ends_bitwise_as_an_uninterrupted_one(tmp_path, kind, seed) -> None:
    # whose first process has computed nothing, so that it can be forked
    done = run_process([sys.executable, "-c", HANDFUL, tmp_path, kind, seed], cwd=ROOT)
    said = "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + said
    assert int(done.stdout.split()[0]) >= 1, "it was killed"
