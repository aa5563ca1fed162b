"""However a run ends, a consistent state is saved, and --resume continues it to the same result."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from components.checkpoint import list_checkpoints, verify
from recipes import cli
from tests.conftest import TinyRun
from tests.distributed.launching import ROOT
from tests.end_to_end.endings import ARGUMENTS, prepare
from tests.end_to_end.test_resume import assert_same_state, tensors, timeless
from tests.processes import run_process

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ENDINGS = {
    # fault: (exit status, what is said)
    "data: cannot be read": (2, "samples 24 to 25: [Errno 5] Input/output error: '/data/shard-7.bin'"),
    "data: no such id": (2, "samples 24 to 25: token id 70000 is outside the vocabulary of 257"),
    "data: another length": (2, "samples 24 to 25: the dataset returns samples of 24 and of 25"),
    "data: a bug": (None, "KeyError: 'text'"),
    "validation: cannot be read": (2, "[Errno 5] Input/output error: '/data/shard-7.bin'"),
    "validation: no such id": (2, "token id 70000 is outside the vocabulary of 257"),
    "validation: another length": (2, "the dataset returns samples of 24 token ids"),
    "validation: a bug": (2, "KeyError: 'text'"),
    "schedule: nan": (1, "step 4: [lr_schedule] Schedule returns the learning rate nan after 576 tokens"),
    "schedule: inf": (1, "[lr_schedule] Schedule returns the learning rate inf"),
    "schedule: -0.01": (1, "[lr_schedule] Schedule returns the learning rate -0.01"),
    "schedule: none": (1, "[lr_schedule] Schedule raises TypeError"),
    "schedule: raises": (1, "[lr_schedule] Schedule raises KeyError: 'x'"),
    "policy: no batch": (2, "batch"),
    "policy: raises": (None, "division by zero"),
    "policy: observe": (None, "division by zero"),
    "model: crash": (None, "in the fourth step"),
    "model: memory": (2, "ran out of memory"),
    "model: nan": (1, "step 4 (samples 24 to 31): loss nan"),
}
"""None: the error goes through the launcher, as a traceback with status 1."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TinyRun:
    return prepare(TinyRun(tmp_path_factory.mktemp("endings")))


@pytest.fixture(scope="module")
def undisturbed(run):
    """The directory of an uninterrupted run, with its checkpoints of steps 3 and 6."""
    directory = run.folder / "undisturbed"
    assert run.launch(*ARGUMENTS, f"--run.dir={directory}", "--checkpoint.interval_steps=3") == 0
    return directory


@pytest.mark.parametrize("fault", ENDINGS)
def test_a_run_that_ends_with_a_consistent_state_saves_it(run, undisturbed, monkeypatch, capsys, fault: str) -> None:
    status, message = ENDINGS[fault]
    run.directory = run.folder / fault.replace(": ", "-")
    arguments = [*ARGUMENTS, f"--run.dir={run.directory}", "--checkpoint.interval_steps=none"]
    monkeypatch.setenv("FAULT", fault)
    capsys.readouterr()
    try:
        ended = run.launch(*arguments)
        error = ""
    except (ArithmeticError, KeyError) as raised:
        ended, error = None, str(raised)
    output = capsys.readouterr()
    said = output.out + output.err + error
    assert ended == status, said
    assert message in said
    if ended is not None:
        assert "Traceback" not in said
    (saved,) = list_checkpoints(run.directory / "checkpoints")
    verify(saved)
    assert_same_state(saved, undisturbed / "checkpoints" / "step-00000003")

    monkeypatch.delenv("FAULT")
    assert run.launch(*arguments, "--resume") == 0
    assert_same_state(run.checkpoint(6), undisturbed / "checkpoints" / "step-00000006")
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert timeless(run.rows()) == timeless(rows), "each row once, validations among them"


@pytest.mark.parametrize("fault", ["validation: cannot be read", "validation: no such id"])
def test_an_evaluation_of_text_that_cannot_be_used_is_one_message(run, undisturbed, monkeypatch, capsys, fault) -> None:
    recipe = run.folder / "evaluate.toml"
    recipe.write_text(f'extends = ["{ROOT / "train_configs" / "evaluate.toml"}"]')
    monkeypatch.setenv("FAULT", fault)
    keys = [f"--evaluation.checkpoint={undisturbed}", "--evaluation.trust_code=true", "--evaluation.limit=3"]
    assert cli.main([str(recipe), *keys, "--data.use=endings:Numbers", "--data.held_out=true"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"^(command line|.*evaluate\.toml:?\d*)  data", said, re.MULTILINE), said
    assert ENDINGS[fault][1] in said and "the run has ended" in said


@pytest.mark.parametrize("remedy", ["--guard.on_bad_sample=skip", "--guard.on_nonfinite=skip"])
def test_the_remedy_that_is_named_works(run, undisturbed, monkeypatch, capsys, remedy: str) -> None:
    """The same start again, without a fix."""
    sample = "sample" in remedy
    run.directory = run.folder / remedy.strip("-")
    arguments = [*ARGUMENTS, f"--run.dir={run.directory}", "--checkpoint.interval_steps=1"]
    monkeypatch.setenv("FAULT", "data: no such id" if sample else "model: nan")
    assert run.launch(*arguments) == (2 if sample else 1)
    output = capsys.readouterr()
    assert remedy in output.out + output.err
    assert run.launch(*arguments, "--resume", remedy) == 0
    said = capsys.readouterr().out
    rows = [row for row in run.rows() if "loss" in row]
    assert [row["samples"] for row in rows] == list(range(8, 49, 8)), "each step once"
    if sample:
        assert "step 4 (samples 24 to 31) has a bad sample: samples 24 to 25: token id 70000" in said
        before, after = tensors(run.checkpoint(3)), tensors(run.checkpoint(4))
        assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("random"))
        assert rows[3]["loss"] is None and rows[3]["lr"] > 0
    assert all(row["loss"] is not None for row in rows if row["step"] != 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_within_the_limit_and_alike_on_resume(run, monkeypatch, capsys, workers: int) -> None:
    monkeypatch.setenv("FAULT", "data: cannot be read")
    monkeypatch.setenv("BAD_SAMPLES", "9,14,25,39")  # in the steps 2, 4 and 5, in step 2 twice
    arguments = [*ARGUMENTS, "--guard.on_bad_sample=skip", f"--training.num_workers={workers}"]
    arguments += ["--checkpoint.interval_steps=1", "--checkpoint.keep_last=none"]
    run.directory = whole = run.folder / f"skips-{workers}"
    assert run.launch(*arguments, f"--run.dir={whole}") == 0
    said = capsys.readouterr().out
    rows = [row for row in run.rows() if "loss" in row]
    assert [row["step"] for row in rows if row["loss"] is None] == [2, 4, 5]
    assert said.count("step skipped") == 3
    assert "step 2 (samples 8 to 15) has a bad sample: samples 8 to 9: [Errno 5]" in said

    run.directory = run.folder / f"skips-resumed-{workers}"
    at_four = f"--resume={whole / 'checkpoints' / 'step-00000004'}"
    assert run.launch(*arguments, f"--run.dir={run.directory}", at_four) == 0
    assert_same_state(run.checkpoint(6), whole / "checkpoints" / "step-00000006")

    limited = f"--run.dir={run.folder / f'limited-{workers}'}"
    assert run.launch(*arguments, limited, "--guard.max_bad_steps=2") == 2
    output = capsys.readouterr()
    assert "consecutive bad steps: 2, which is guard.max_bad_steps" in output.out + output.err
    # the count is part of the checkpoint: one more after it is too many
    assert run.launch(*arguments, limited, "--resume", "--guard.max_bad_steps=2") == 2


def test_a_state_that_is_not_finite_is_never_saved_and_removes_no_checkpoint(run, monkeypatch, capsys) -> None:
    """A learning rate that is finite, and too large for float32."""
    arguments = [*ARGUMENTS, "--checkpoint.interval_steps=1", "--checkpoint.keep_last=1"]
    monkeypatch.setenv("FAULT", "schedule: 1e300")
    run.directory = run.folder / "overflow"
    assert run.launch(*arguments, f"--run.dir={run.directory}") == 1
    said = capsys.readouterr().out
    assert "the state after step 4 is not finite: " in said
    assert f"It is not saved; the last good checkpoint is {run.checkpoint(3)}" in said
    assert list_checkpoints(run.directory / "checkpoints") == [run.checkpoint(3)]
    assert all(tensor.isfinite().all() for tensor in tensors(run.checkpoint(3)).values())
    monkeypatch.delenv("FAULT")
    assert run.launch(*arguments, f"--run.dir={run.directory}", "--resume") == 0, "the remedy works"

    monkeypatch.setenv("FAULT", "schedule: 1e300")
    run.directory = run.folder / "overflow-rolled-back"
    arguments += [f"--run.dir={run.directory}", "--guard.on_nonfinite=roll_back"]
    assert run.launch(*arguments) == 0
    said = capsys.readouterr().out
    assert said.count("rolled back to step-00000003") == 1
    assert all(tensor.isfinite().all() for tensor in tensors(run.checkpoint(6)).values())


def test_two_processes_agree_on_an_error_that_one_of_them_meets(run, monkeypatch, tmp_path) -> None:
    directory = tmp_path / "run"
    run.directory = directory
    arguments = [*ARGUMENTS, f"--run.dir={directory}", "--checkpoint.interval_steps=none"]

    limit = "--guard.max_bad_steps=2"

    def start(fault: str, bad: str, *more: str) -> tuple[int, str]:
        for name, value in {"FAULT": fault, "FAULT_RANK": "1", "NPROC": "2", "BAD_SAMPLES": bad}.items():
            monkeypatch.setenv(name, value)
        done = run_process([sys.executable, ROOT / "recipes", str(run.recipe), *arguments, *more])
        said = done.stdout + done.stderr
        assert "Traceback" not in said
        return done.returncode, said

    status, said = start("validation: cannot be read", "2")
    assert status == 2, said
    assert said.count("[Errno 5] Input/output error: '/data/shard-7.bin'") == 1
    assert list_checkpoints(directory / "checkpoints") == [run.checkpoint(3)]
    status, said = start("data: cannot be read", "26,34", "--resume", "--guard.on_bad_sample=skip", limit)
    assert status == 2, said
    assert "step 4 (samples 24 to 31) has a bad sample: samples 26 to 27: [Errno 5]" in said
    assert "step 5 (samples 32 to 39) has a bad sample: samples 34 to 35: [Errno 5]" in said
    assert list_checkpoints(directory / "checkpoints")[-1] == run.checkpoint(4)
    rows = run.rows()
    assert [row["step"] for row in rows if "val_loss" in row] == [3], "once it could be read"
    assert [row["step"] for row in rows if row.get("loss", 0) is None] == [4]
