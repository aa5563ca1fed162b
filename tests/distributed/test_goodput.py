"""Two processes over a slow network choose the same batches from times that each of them measures.

The delay of a reduction is simulated: it advances the clock of a process, on one of them twice as far as on the other.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.distributed.layouts import run_all
from tests.end_to_end.test_goodput import KEYS, UNSAVED

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODES = ("once_per_step", "every_micro_batch")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with a run for every mode of training.grad_sync."""
    folder = tmp_path_factory.mktemp("goodput")
    tiny = TinyRun(folder)
    commands = [
        [str(tiny.recipe), *KEYS, *UNSAVED, "--batch.initial_size=8", "--batch.multiple_of=4",
         "--training.total_tokens=16000", f"--training.grad_sync={mode}", f"--run.dir={folder / mode}",
         "--hooks.slow.use=tests.delays:SlowNetwork", "--hooks.slow.reduction_seconds=1",
         f"--hooks.slow.notes={folder / mode / 'notes'}"]
        for mode in MODES
    ]  # fmt: skip
    run_all(2, commands, folder)
    return folder


def chosen(run: Path, rank: int) -> list[int]:
    """Return the sizes of the steps that a rank trained."""
    samples = json.loads((run / "notes" / f"rank-{rank}.json").read_text())
    return [later - earlier for earlier, later in pairwise([0, *samples])]


def costs(run: Path) -> tuple[float, float]:
    """Return the fixed seconds of a step, and the seconds of a micro-batch, as last measured."""
    rows = [row for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    return rows[-1]["goodput_fixed_seconds"], rows[-1]["goodput_micro_batch_seconds"]


@pytest.mark.parametrize("mode", MODES)
def test_both_ranks_choose_the_same_sizes(runs, mode):
    sizes = chosen(runs / mode, rank=0)
    assert len(sizes) > 20 and chosen(runs / mode, rank=1) == sizes


def test_the_times_are_the_mean_over_the_ranks(runs):
    """A reduction takes 1 s on one rank and 2 s on the other, a pass 0.02 s."""
    assert costs(runs / "once_per_step") == pytest.approx((1.5, 0.02), abs=1e-3)
    assert costs(runs / "every_micro_batch") == pytest.approx((0, 1.52), abs=1e-3)


def test_one_delay_of_a_step_grows_the_batch(runs):
    sizes = chosen(runs / "once_per_step", rank=0)
    assert sizes[0] == 8 and sizes[-1] >= 16


def test_a_delay_of_every_micro_batch_does_not(runs):
    sizes = chosen(runs / "every_micro_batch", rank=0)
    assert max(sizes) <= 16, "tried for a few steps"
    assert sizes[-1] == 8 and sizes.count(8) > len(sizes) - 12
