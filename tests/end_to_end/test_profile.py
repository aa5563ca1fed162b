"""A run that is profiled: its trace, its table, and that it is otherwise the same run."""

from __future__ import annotations

import gzip
import json

import pytest

from components.profiler import break_down, read_trace
from components.profiler import kernel_kinds as kinds

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PLAIN = ["--checkpoint.interval_steps=none", "--validation.interval_steps=4"]


def losses(tiny) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in tiny.rows() if "loss" in row]


def test_a_window_of_steps_is_recorded_and_changes_nothing(tiny):
    assert tiny.launch(*PLAIN) == 0
    assert not (tiny.directory / "profile").exists()
    expected = losses(tiny)

    arguments = [*PLAIN, "--profile.steps=3", "--profile.start_step=3", "--run.if_exists=replace"]
    assert tiny.launch(*arguments) == 0
    assert losses(tiny) == expected
    trace = tiny.directory / "profile" / "steps-3-to-5-rank-0.trace.json.gz"
    with gzip.open(trace, "rt") as text:
        named = {event.get("name") for event in json.load(text)["traceEvents"]}
    assert {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"} <= named
    assert "ProfilerStep#6" not in named

    found = break_down(read_trace(trace))
    assert (found.device, found.steps) == ("cpu", 3)
    assert sum(found.times.values()) == pytest.approx(found.window, rel=1e-9)
    never_here = {kinds.COMMUNICATION, kinds.COPIES}
    assert set(found.times) == set(kinds.KINDS) - never_here
    assert all(time > 0 for time in found.times.values())
    table = trace.with_name("steps-3-to-5-rank-0.txt").read_text()
    log = (tiny.directory / "log.txt").read_text()
    assert table in log and str(trace) in log
    assert all(kind in table for kind in found.times)

    # the next run in this place removes it
    assert tiny.launch(*PLAIN, "--run.if_exists=replace") == 0
    assert not (tiny.directory / "profile").exists()


def test_a_run_that_resumes_inside_the_window_or_ends_there_records_what_it_takes_of_it(tiny):
    window = ["--profile.steps=4", "--profile.start_step=13", "--batch.stages=[]", "--validation.interval_steps=none"]
    assert tiny.launch(*window, "--training.total_tokens=2688") == 0  # 14 steps of 8 x 24
    assert tiny.launch(*window, "--resume") == 0  # to step 19
    written = sorted(file.name for file in (tiny.directory / "profile").glob("*.txt"))
    assert written == ["steps-13-to-14-rank-0.txt", "steps-15-to-16-rank-0.txt"]
    assert break_down(read_trace(tiny.directory / "profile" / "steps-13-to-14-rank-0.trace.json.gz")).steps == 2


def test_a_window_that_the_run_never_reaches_is_reported(tiny):
    assert tiny.launch(*PLAIN, "--profile.steps=2", "--profile.start_step=20") == 0
    assert not (tiny.directory / "profile").exists()
    assert (
        "no profile was recorded: steps 20 to 21 (profile.start_step = 20, profile.steps = 2) are not among steps "
        "1 to 14, which this run took" in (tiny.directory / "log.txt").read_text()
    )


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--profile.steps=-1", "profile.steps"),
        ("--profile.start_step=0", "profile.start_step"),
        ("--profile.stop_step=9", "start_step"),
        ("--profile.memory_snapshot=true", "the device is cpu"),
    ],
)
def test_bad_keys_are_refused_with_one_message(tiny, capsys, argument: str, said: str):
    assert tiny.launch("--profile.steps=1", argument) == 2
    output = capsys.readouterr().err
    assert said in output and "Traceback" not in output
    assert not (tiny.directory / "metrics.jsonl").exists()
