"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, the status says so, and nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_resume import assert_same_state, timeless
from tests.processes import start_process, wait_until

ROOT = Path(__file__).resolve().parents[2]
LONG = ["--training.total_tokens=40000", "--checkpoint.interval_steps=none"]


def start(tiny, *arguments):
    command = [sys.executable, ROOT / "recipes", str(tiny.recipe), *LONG, *arguments]
    return start_process(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_steps(tiny, count, process):
    metrics = tiny.directory / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= count, process)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_and_continues_as_if_it_had_never_stopped(new_tiny, number, status):
    stopped, undisturbed = new_tiny("stopped"), new_tiny("undisturbed")
    process = start(stopped)
    wait_for_steps(stopped, 5, process)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == status, output
    assert "continue with --resume" in output
    assert "Traceback" not in output
    assert stopped.launch(*LONG, "--resume") == 0
    assert undisturbed.launch(*LONG) == 0
    assert timeless(stopped.rows()) == timeless(undisturbed.rows())
    last = stopped.rows()[-1]["step"]
    assert_same_state(stopped.checkpoint(last), undisturbed.checkpoint(last))
