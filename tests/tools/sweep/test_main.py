"""The command that runs a sweep; once with real runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.cli import ROOT
from tests.processes import start_process, wait_until
from tests.tools.sweep.outcomes import pretend
from tools.sweep.__main__ import main
from tools.sweep.runner import report_stop


@pytest.mark.quick
def test_the_table_has_the_mean_over_seeds_of_each_setting_and_nothing_is_run_twice(
    tiny, tmp_path, monkeypatch, capsys
):
    losses = {"1e-3": 2.0, "2e-3": 1.0, "4e-3": 1.5}
    launched = pretend(monkeypatch, lambda keys: losses[keys["lr_schedule.max_lr"]] + int(keys["run.seed"]) / 10)
    grids = ["--grid", "lr_schedule.max_lr=1e-3,2e-3,4e-3", "--grid", "run.seed=0,1"]
    command = [str(tiny.recipe), *grids, "--results", str(tmp_path / "results.jsonl"), "--jobs", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "6 of 6 runs are done, 0 of them failed" in said
    assert "| lr_schedule.max_lr | loss | runs | steps | seconds |" in said
    assert "| 1e-3 | 2.0500 | 2 | " in said and "| 2e-3 | **1.0500** | 2 | " in said
    assert main([*command, "--report"]) == 0
    assert capsys.readouterr().out == said
    assert len(launched) == 6


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "lr_schedule.max_lrr=1,2"], "did you mean max_lr?"),
        (["--grid", "lr_schedule.max_lr=1,2", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["--grid", "lr_schedule.max_lr=1,2", "--resume"], "options of ./run_train.sh"),
    ],
)
def test_bad_input_is_reported_and_nothing_is_started(tiny, tmp_path, monkeypatch, capsys, arguments, said):
    launched = pretend(monkeypatch, lambda settings: 1.0)
    assert main([str(tiny.recipe), *arguments, "--results", str(tmp_path / "results.jsonl")]) == 2
    assert said in capsys.readouterr().err
    assert not launched


def test_runs_are_those_of_the_launcher_and_one_that_fails_is_reported(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results, kept = tmp_path / "results.jsonl", tmp_path / "kept"
    command = [str(tiny.recipe), "--grid", "lr_schedule.max_lr=1e-2,1e9", "--training.max_grad_norm=none"]
    assert main([*command, "--results", str(results), "--runs", str(kept)]) == 0
    assert "max_lr = 1e9: failed after" in capsys.readouterr().out
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    good = next(row for row in rows if row["varied"]["lr_schedule.max_lr"] == "1e-2")
    assert tiny.launch("--training.max_grad_norm=none") == 0
    own = tiny.rows()
    assert good["outcome"]["val_loss"] == own[-1]["val_loss"]
    assert (good["outcome"]["steps"], good["outcome"]["tokens"]) == (own[-1]["step"], own[-1]["tokens"])
    assert (kept / good["digest"] / "metrics.jsonl").exists()


@pytest.mark.quick
def test_the_status_of_a_sweep_that_was_stopped_names_the_signal():
    assert report_stop(KeyboardInterrupt()) == 130  # Ctrl-C, as Python raises it
    assert report_stop(KeyboardInterrupt(signal.SIGTERM)) == 143


def test_a_signal_ends_the_runs_and_unfinished_ones_are_not_stored(tiny, tmp_path):
    results, kept = tmp_path / "results.jsonl", tmp_path / "kept"
    command = ["--grid", "lr_schedule.max_lr=1e-3,2e-3", "--training.total_tokens=1B"]
    sweep = start_process(
        [sys.executable, "-m", "tools.sweep", tiny.recipe, *command, "--results", results, "--runs", kept],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_until(lambda: any(path.stat().st_size for path in Path(kept).glob("*/metrics.jsonl")), sweep)
    sweep.send_signal(signal.SIGTERM)
    _, said = sweep.communicate()
    assert sweep.returncode == 143, said
    assert "stopped; the same command continues" in said and "Traceback" not in said
    assert not results.exists()
    (started,) = kept.iterdir()  # the second was not started
    assert "stopped by signal" in (started / "log.txt").read_text()
