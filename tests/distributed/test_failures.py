"""If one process dies, the others end, the cause is reported, and the run continues from its newest checkpoint."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from benchmarks.torture.nodes import processes_below
from tests.distributed.launching import SHORT, final_loss, finish, start, steps
from tests.end_to_end.test_signals import wait_for_steps


def test_a_killed_rank_is_restarted_and_the_run_ends_as_if_uninterrupted(new_tiny):
    alone, killed = new_tiny("alone"), new_tiny("killed")
    assert alone.launch(*SHORT) == 0
    status, said = finish(
        start(killed, "--checkpoint.async_save=true", sabotage={0: "kill:1:10"}, NPROC="2", MAX_RESTARTS="1")
    )
    assert status == 0, said
    assert "rank 1" in said
    assert "was killed by SIGKILL" in said
    assert "resumed from" in said
    assert steps(killed) == steps(alone), "every step once"
    assert final_loss(killed) == pytest.approx(final_loss(alone), rel=1e-5)


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="needs /dev/shm")
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_restart_continues_from_the_memory_of_the_node(new_tiny, asynchronous):
    alone, killed = new_tiny("alone"), new_tiny("killed")
    assert alone.launch(*SHORT) == 0
    keys = ["--checkpoint.interval_steps=none", "--checkpoint.in_memory_interval_steps=4"]
    keys += [f"--checkpoint.async_save={asynchronous}"]
    once = {"NPROC": "2", "MAX_RESTARTS": "1", "KILL_AFTER": "step-00000004"}
    status, said = finish(start(killed, *keys, sabotage={0: "kill:1:12"}, **once))
    assert status == 0, said
    (place,) = re.findall(r"resumed from (/dev/shm/powertrain-.*)/step-00000004: step 4", said)
    assert not Path(place).exists(), "the memory is free again"
    assert "1 steps since step-00000004 are trained again" in said
    assert steps(killed) == steps(alone), "every step once"
    assert final_loss(killed) == pytest.approx(final_loss(alone), rel=1e-5)
    assert [path.name for path in killed.checkpoints()] == ["step-00000008"], "the last one is on disk"


def test_a_rank_that_hangs_is_found_and_restarted(new_tiny):
    alone, hangs = new_tiny("alone"), new_tiny("hangs")
    assert alone.launch(*SHORT) == 0
    process = start(hangs, "--run.hang_timeout_seconds=8", NPROC="2", MAX_RESTARTS="1", PACE="0.2")
    wait_for_steps(hangs, 3, process)
    _, second = [pid for pid in processes_below(process.pid) if pid != process.pid]
    os.kill(second, signal.SIGSTOP)
    status, said = finish(process)
    assert status == 0, said
    assert re.search(
        r"no progress on (rank 0|rank 1|rank 0, rank 1) for run.hang_timeout_seconds; .*restarting", said
    ), said
    assert re.search(r"most recent call first.*in (all_reduce|wait|launch|accumulate)", said, re.DOTALL), "a stack"
    assert steps(hangs) == steps(alone)
    assert final_loss(hangs) == pytest.approx(final_loss(alone), rel=1e-5)


def test_each_failure_is_reported_once_and_the_last_ends_all_processes(tiny):
    """Rank 1 raises first; after the restart it is killed, and there is no further restart."""
    status, said = finish(start(tiny, sabotage={0: "raise:1:6", 1: "kill:1:3"}, NPROC="2", MAX_RESTARTS="1"))
    assert status == 1, said
    assert said.count("ArithmeticError: sabotage") == 1
    assert said.index("ArithmeticError: sabotage") > said.index("rank 1 (process")
    assert said.count("was killed by SIGKILL") == 1
    assert said.count("restarting all processes") == 1
    assert "torch.distributed.elastic" not in said, "the launcher's own words, not the agent's"
    for number in re.findall(r"\(process (\d+)\)", said):
        with pytest.raises(ProcessLookupError):
            os.kill(int(number), 0)


def test_a_restart_before_the_first_checkpoint_starts_over(new_tiny):
    alone, again = new_tiny("alone"), new_tiny("again")
    assert alone.launch(*SHORT) == 0
    once = {"NPROC": "1", "MAX_RESTARTS": "1"}
    status, said = finish(start(again, "--checkpoint.interval_steps=none", sabotage={0: "kill:0:10"}, **once))
    assert status == 0, said
    assert "resumed" not in said
    assert steps(again) == steps(alone)
    assert final_loss(again) == final_loss(alone)
    # A restart may replace the files in its directory, a new launch may not; a refusal is not retried.
    status, said = finish(start(again, **once))
    assert status == 2, said
    assert said.count("already holds a run") == 1
    assert "restarting all processes" not in said


@pytest.mark.parametrize(
    ("number", "processes", "status"),
    [(signal.SIGINT, "2", 130), (signal.SIGTERM, "1", 143), (signal.SIGKILL, "1", -signal.SIGKILL)],
)
def test_a_signal_to_the_launcher_stops_all_processes_after_saving(tiny, number, processes, status):
    long = ["--training.total_tokens=400000", "--checkpoint.interval_steps=none"]
    process = start(tiny, *long, NPROC=processes, MAX_RESTARTS="1")
    wait_for_steps(tiny, 3, process)
    process.send_signal(number)
    ended, said = finish(process)
    assert ended == status, said
    assert "continue with --resume" in said
    assert "Traceback" not in said
    assert "restarting all processes" not in said
    assert tiny.checkpoint(steps(tiny)[-1]).is_dir()
