"""What is wrong with a recipe or a layout is told once, before any process starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
    assert "1 (dp_replicate) x 3 (dp_shard) x 1 (tp) is not the 2 processes" in done.stderr
