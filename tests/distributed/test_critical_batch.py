"""A critical-batch measurement on two processes gives the numbers of one, also if a process dies in a branch."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launching import finish, start

MEASURE = [
    "--recipe=recipes.critical_batch:CriticalBatch",
    "--branches.batch_multipliers=[1,2]",
    "--branches.tokens=768",
]
"""Four steps of 8 samples of 24 tokens, two of 16."""


def test_two_processes_measure_what_one_does_and_a_dead_one_is_restarted(tiny):
    assert finish(start(tiny))[0] == 0

    def measure(name: str, **how) -> tuple[dict, str]:
        directory = tiny.folder / name
        place = [f"--run.dir={directory}", f"--branches.checkpoint={tiny.checkpoint(3)}"]
        status, said = finish(start(tiny, *MEASURE, *place, **how))
        assert status == 0, said
        return json.loads((directory / "critical_batch.json").read_text()), said

    alone, _ = measure("alone")
    two, said = measure("two", NPROC="2")
    assert said.count("k* =") == said.count("branches of ") == 1, "only one process logs"
    again, said = measure("again", NPROC="2", MAX_RESTARTS="1", sabotage={0: "kill:1:6"})
    assert "was killed by SIGKILL" in said
    assert "resumed from" in said
    assert again == two
    assert (two["k_star"], two["batch"], two["lr"]) == (alone["k_star"], 8, 0.01)
    for one, other in zip(alone["branches"], two["branches"], strict=True):
        assert other["smoothed_loss"] == pytest.approx(one["smoothed_loss"], abs=1e-4)
        assert other["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)


def test_bad_input_is_reported_once(tiny):
    status, said = finish(start(tiny, *MEASURE, f"--branches.checkpoint={tiny.folder}", NPROC="2"))
    assert status == 2
    assert said.count("is neither a checkpoint nor a run directory") == 1
    assert "Traceback" not in said
