"""Errors of a recipe or a layout are reported once, before any process starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("--training.total_token=1", "did you mean total_tokens?"),
        ("--parallel.dp_shard=3", "1 (dp_replicate) x 3 (dp_shard) x 1 (tp) is not the 2 processes"),
    ],
)
def test_bad_input_is_reported_once_before_any_process_starts(tiny, mistake, said):
    done = subprocess.run(
        [ROOT / "run_train.sh", tiny.recipe, mistake],
        env={**os.environ, "PYTHON": sys.executable, "NPROC": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count(said) == 1
    assert "Traceback" not in done.stderr
