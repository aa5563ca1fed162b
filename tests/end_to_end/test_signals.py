"""Ctrl-C, SIGTERM and SIGHUP: the step is finished, a checkpoint saved, the status says so, and nothing is lost."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.checkpoint import list_checkpoints, verify
from tests.conftest import TinyRun
from tests.end_to_end.test_resume import assert_same_state, timeless
from tests.processes import start_process, wait_until

ROOT = Path(__file__).resolve().parents[2]
LONG = ["--training.total_tokens=40000", "--checkpoint.interval_steps=none"]


def start(tiny, *arguments, before=(), **options):
    command = [sys.executable, *before, ROOT / "recipes", str(tiny.recipe), *LONG, *arguments]
    return start_process(command, **({"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options))


IN_A_TERMINAL = """
import os, runpy, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first that a session opens is the one that controls it
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def wait_for_steps(tiny, count, process):
    metrics = tiny.directory / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= count, process)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run that nothing has stopped."""
    run = TinyRun(tmp_path_factory.mktemp("undisturbed"))
    assert run.launch(*LONG) == 0
    return run


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_stopped_run_saves_and_continues_as_if_it_had_never_stopped(tiny, undisturbed, number, status):
    process = start(tiny)
    wait_for_steps(tiny, 5, process)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == status, output
    assert "continue with --resume" in output
    assert "Traceback" not in output
    assert tiny.launch(*LONG, "--resume") == 0
    assert timeless(tiny.rows()) == timeless(undisturbed.rows())
    last = tiny.rows()[-1]["step"]
    assert_same_state(tiny.checkpoint(last), undisturbed.checkpoint(last))


def assert_saved(tiny):
    (saved,) = list_checkpoints(tiny.directory / "checkpoints")
    verify(saved)
    assert saved == tiny.checkpoint([row["step"] for row in tiny.rows() if "loss" in row][-1])


def test_two_processes_under_nohup_continue_when_the_terminal_closes(tiny, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    process = start(tiny, "--training.total_tokens=50M", ignored=(signal.SIGHUP,), start_new_session=True)
    wait_for_steps(tiny, 3, process)
    os.killpg(process.pid, signal.SIGHUP)  # as the kernel does: to the launcher and to its workers
    wait_for_steps(tiny, len(tiny.rows()) + 20, process)
    process.terminate()
    said, _ = process.communicate()
    assert process.returncode == 143, said
    assert "stopped by signal 15" in said
    assert_saved(tiny)


def test_two_processes_save_when_their_terminal_closes(tiny, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    terminal, end = pty.openpty()

    streams = {"stdin": end, "stdout": end, "stderr": end, "text": False, "start_new_session": True}
    process = start(tiny, "--training.total_tokens=50M", before=("-c", IN_A_TERMINAL), **streams)
    os.close(end)
    wait_for_steps(tiny, 3, process)
    os.close(terminal)
    assert process.wait() in (129, 120), "120: Python could not flush its output"
    assert_saved(tiny)
    assert "stopped by signal 1 after step" in (tiny.directory / "log.txt").read_text()
