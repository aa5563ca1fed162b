"""The GPU benchmark in tiny shapes on the CPU, where it would otherwise never run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_throughput
from benchmarks.gpu_throughput import Row, failure_reason, run_case, table, verdicts

ROOT = Path(__file__).resolve().parents[2]


def test_a_smoke_run_fills_its_table(tmp_path):
    pytest.importorskip("transformers")
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_throughput", "--smoke", "--steps=5", "--models=300M",
         "--kinds", "eager", "plain", "--output", output],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [(row["model"], row["kind"], row["note"]) for row in rows] == [("300M", "plain", ""), ("300M", "eager", "")]
    for row in rows:
        assert len(row["step_seconds"]) == 2 and row["tokens_per_step"] == 4 * 2 * 32
        assert row["memory_bytes"] > 0 and row["start_seconds"] > 0
        assert f"| 300M | {row['kind']} | " in done.stdout
        assert all(abs(loss - math.log(512)) < 0.2 for loss in row["losses"]), "random tokens cannot be predicted"


def test_a_failed_case_reports_its_reason(tmp_path):
    row = Row("300M", "no such kind")
    run_case(row, ["--smoke"], limit=60)
    assert row.note.startswith("failed (2): ") and "invalid choice" in row.note
    assert row.step_seconds == [] and "invalid choice" in table([row])


@pytest.mark.quick
def test_cases_without_time_left_are_reported(tmp_path, monkeypatch, capsys):
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--minutes=0", "--output", str(output)])
    monkeypatch.setattr(gpu_throughput.signal, "signal", lambda *_: None)
    assert gpu_throughput.main() == 0
    assert capsys.readouterr().out.count("skipped: 0 s were left") == len(gpu_throughput.ORDER)
    assert len(json.loads(output.read_text())["rows"]) == len(gpu_throughput.ORDER)


@pytest.mark.quick
def test_an_interrupted_run_prints_what_it_has(tmp_path, monkeypatch, capsys):
    def interrupted(row, extra, limit):
        if row.kind == "plain":
            raise KeyboardInterrupt
        row.step_seconds, row.tokens_per_step = [0.5], 100

    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--models=3B", "--output", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(gpu_throughput.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_throughput, "run_case", interrupted)
    assert gpu_throughput.main() == 130
    out = capsys.readouterr().out
    assert (
        "| 3B | compiled | 200 (200 to 200) |" in out
        and out.count("not run: interrupted") == sum(model == "3B" for model, _ in gpu_throughput.ORDER) - 1
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "Traceback\n  File\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has",
            "failed (1): OutOfMemoryError: CUDA out of memory",
        ),
        (
            "ModuleNotFoundError: No module named 'transformers'",
            "failed (1): ModuleNotFoundError: No module named 'transformers'",
        ),
        ("Killed\n", "failed (1): Killed"),
        ("", "failed (1): "),
    ],
)
def test_the_reason_is_the_error_itself(output, said):
    assert failure_reason(output, 1) == said


@pytest.mark.quick
def test_goals_are_compared_with_the_medians():
    ours = Row("1.1B", "compiled", mfu=0.55, step_seconds=[1.0, 1.0, 9.0], tokens_per_step=10)
    theirs = Row("1.1B", "plain", step_seconds=[1.2], tokens_per_step=10)
    assert verdicts([ours, theirs, Row("3B", "compiled")]) == [
        "goal: 1.1B, MFU, at least 50%: 55%, met",
        "goal: 1.1B, times the plain loop, at least 1.30: 1.20, missed",
        "goal: 3B, MFU, at least 50%: not measured",
        "goal: 3B, times the plain loop, at least 1.30: not measured",
    ]


@pytest.mark.quick
def test_a_missing_gpu_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(gpu_throughput.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu_throughput.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
