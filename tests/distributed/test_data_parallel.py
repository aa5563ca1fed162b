"""The same recipe on several processes: same samples, same losses, checkpoints that move between world sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_resume import tensors

ROOT = Path(__file__).resolve().parents[2]
WHOLE_BATCHES = ["--batch.use=components.batch.constant:Constant", "--batch.initial=8"]
"""Eight samples are whole micro-batches of two on one, two and four processes."""


def launch(tiny, processes, *arguments):
    done = subprocess.run(
        [ROOT / "run_train.sh", tiny.recipe, *WHOLE_BATCHES, *arguments],
        env={**os.environ, "PYTHON": sys.executable, "NPROC": str(processes), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(tiny):
    return [row["loss"] for row in tiny.rows() if "loss" in row]


def validations(tiny):
    return [row["val_bits_per_byte"] for row in tiny.rows() if "val_loss" in row]


@pytest.mark.parametrize(
    "layout", [(2, 1), (1, 2), (2, 2)], ids=["two replicas", "two shards", "two replicas of two shards"]
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_step_loses_what_it_loses_on_one_process(new_tiny, layout):
    replicas, shards = layout
    alone, together = new_tiny("alone"), new_tiny("together")
    assert alone.launch(*WHOLE_BATCHES) == 0
    said = launch(together, replicas * shards, f"--parallel.dp_replicate={replicas}", f"--parallel.dp_shard={shards}")
    assert said.count("saved") == len(losses(alone)), "one process speaks"
    # float32 sums in another order; 16 steps of Adam let the difference grow
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert validations(together) == pytest.approx(validations(alone), rel=1e-5)
    last = alone.rows()[-1]["step"]
    first, second = tensors(alone.checkpoint(last)), tensors(together.checkpoint(last))
    for name in first:
        if name.startswith("model."):
            assert (first[name] - second[name]).abs().max() < 1e-4, name


def test_a_checkpoint_of_two_processes_continues_on_one_and_back(new_tiny):
    alone, moved = new_tiny("alone"), new_tiny("moved")
    assert alone.launch(*WHOLE_BATCHES) == 0
    launch(moved, 2, "--training.total_tokens=1000")
    assert moved.launch(*WHOLE_BATCHES, "--resume", "--training.total_tokens=2000") == 0
    launch(moved, 2, "--resume")
    # the same tokens in all three parts, but WSD decayed at the end of each shorter one
    assert len(losses(moved)) == len(losses(alone))
    assert [row["samples"] for row in moved.rows() if "loss" in row] == [
        row["samples"] for row in alone.rows() if "loss" in row
    ]
    assert losses(moved)[:4] == pytest.approx(losses(alone)[:4], rel=1e-5)


def test_a_mistake_is_told_once_before_any_process_starts(tiny):
    done = subprocess.run(
        [ROOT / "run_train.sh", tiny.recipe, "--training.total_token=1"],
        env={**os.environ, "PYTHON": sys.executable, "NPROC": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("did you mean total_tokens?") == 1
    assert "Traceback" not in done.stderr


def test_a_layout_that_does_not_fit_shows_its_arithmetic(tiny):
    done = subprocess.run(
        [ROOT / "run_train.sh", tiny.recipe, "--parallel.dp_shard=3"],
        env={**os.environ, "PYTHON": sys.executable, "NPROC": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "1 (dp_replicate) x 3 (dp_shard) is not the 2 processes" in done.stderr
