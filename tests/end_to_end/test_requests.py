"""A stop file, a time limit, and SIGUSR1, which saves and continues."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from components.distributed import worker
from recipes import cli
from recipes.step_metrics import StepMetrics
from tests.distributed.launching import finish, start
from tests.end_to_end.test_signals import wait_for_steps
from tests.processes import wait_until

LONG = ["--training.total_tokens=40000", "--checkpoint.interval_steps=none", "--validation.interval_steps=none"]


def after_steps(monkeypatch: pytest.MonkeyPatch, count: int, act) -> None:
    """Do something once `count` steps have been trained."""
    row, done = StepMetrics.row, []

    def observed(metrics, launched, *args, **kwargs):
        if launched.progress.step == count and not done:
            done.append(1)
            act()
        return row(metrics, launched, *args, **kwargs)

    monkeypatch.setattr(StepMetrics, "row", observed)


@pytest.mark.parametrize("how", ["the stop file", "run.max_minutes"])
def test_a_run_stops_and_saves(tiny, capsys, monkeypatch, how: str) -> None:
    monkeypatch.setattr("components.interrupts._FILE_INTERVAL_SECONDS", 0.0)
    if how == "the stop file":
        after_steps(monkeypatch, 5, lambda: (tiny.directory / "stop").touch())
        limit = "--run.max_minutes=none"
    else:
        after_steps(monkeypatch, 5, lambda: monkeypatch.setattr(time, "time", lambda: sys.maxsize))
        limit = "--run.max_minutes=60"
    assert tiny.launch(*LONG, limit) == (130 if how == "the stop file" else 143)
    assert f"stopped by {how} after step 5; continue with --resume" in capsys.readouterr().out
    assert tiny.checkpoint(5).is_dir()
    assert not (tiny.directory / "stop").exists()
    monkeypatch.undo()
    (tiny.directory / "stop").touch()  # left over from before: it is not for this run
    assert tiny.launch("--training.total_tokens=2000", "--resume") == 0


def test_a_limit_counts_from_the_launch_not_from_a_restart(tiny, capsys, monkeypatch) -> None:
    monkeypatch.setenv(worker.LAUNCHED_AT, str(time.time() - 3600))
    assert tiny.launch(*LONG, "--run.max_minutes=59") == 143
    assert "stopped by run.max_minutes after step 1" in capsys.readouterr().out


def test_sigusr1_saves_and_continues(tiny, capsys, monkeypatch) -> None:
    after_steps(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert tiny.launch("--training.total_tokens=2000", *LONG[1:]) == 0
    steps = [int(path.name[5:]) for path in sorted((tiny.directory / "checkpoints").iterdir())]
    assert steps == [5, max(row["step"] for row in tiny.rows())]
    assert "step      5  saved" in capsys.readouterr().out


def test_before_a_run_is_ready_sigusr1_does_nothing(tiny, monkeypatch) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        monkeypatch.setattr(cli, "run_command", lambda arguments: os.kill(os.getpid(), signal.SIGUSR1) or 0)
        assert cli.main([]) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_all_processes_save_and_stop_at_the_same_step(tiny) -> None:
    """SIGUSR1 to the launcher of two processes, then a stop file."""
    long = ["--training.total_tokens=400000", "--checkpoint.interval_steps=none"]
    process = start(tiny, *long, NPROC="2")
    wait_for_steps(tiny, 3, process)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: list((tiny.directory / "checkpoints").glob("step-*")), process)
    threading.Timer(0.2, (tiny.directory / "stop").touch).start()
    status, said = finish(process)
    assert status == 130, said
    assert "stopped by the stop file" in said
    assert "Traceback" not in said
    saved = sorted(int(path.name[5:]) for path in (tiny.directory / "checkpoints").iterdir())
    assert len(saved) == 2
    assert saved[-1] == max(row["step"] for row in tiny.rows())
