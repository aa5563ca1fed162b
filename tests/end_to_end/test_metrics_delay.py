"""The host reads the numbers of a step while the next one runs, as on a GPU: here it is made to do so on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.test_bad_steps import BAD, SMALL
from tests.end_to_end.test_batch_and_lr import MEASURED, UNBIASED
from tests.end_to_end.test_resume import assert_same_state, tensors, timeless


@pytest.fixture
def delay(monkeypatch):
    def set_delay(steps: int) -> None:
        monkeypatch.setattr("recipes.pretrain.metrics_delay", lambda *_: steps)

    return set_delay


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(tiny) -> list[dict]:
    return [row for row in timeless(tiny.rows()) if "loss" in row]


def test_without_adaptation_the_delay_changes_nothing(new_tiny, delay):
    now, later = new_tiny("now"), new_tiny("later")
    assert now.launch("--checkpoint.interval_steps=none") == 0
    delay(1)
    assert later.launch("--checkpoint.interval_steps=none") == 0
    assert timeless(later.rows()) == timeless(now.rows())
    assert_same_tensors(now.checkpoint(14), later.checkpoint(14))


def test_a_policy_observes_one_step_later_however_often_the_run_is_saved(new_tiny, delay):
    """Resuming from any checkpoint, or saving at other steps, gives the same batches and the same parameters."""
    policy = [*MEASURED, *UNBIASED, "--validation.interval_steps=none"]
    unsaved = [*policy, "--checkpoint.interval_steps=none"]
    delay(1)
    seldom, often = new_tiny("seldom"), new_tiny("often")
    assert seldom.launch(*unsaved) == 0
    assert often.launch(*policy) == 0
    rows = steps(seldom)
    assert rows[:-1] == steps(often)[:-1]
    batches = [row["global_batch_size"] for row in rows]
    assert batches[0] == batches[1], "nothing is known yet when the second step starts"
    assert len(set(batches)) > 1, "the batch adapts"
    middle = next(step for step in range(2, len(batches)) if batches[step] != batches[step - 1])
    last = rows[-1]["step"]
    for step in (1, middle):
        resumed = [f"--resume={often.checkpoint(step)}", f"--run.dir={often.folder / f'from-{step}'}"]
        assert often.launch(*unsaved, *resumed) == 0
        assert_same_state(often.checkpoint(last), often.folder / f"from-{step}" / "checkpoints" / f"step-{last:08d}")


@pytest.mark.parametrize("action", ["skip", "roll_back", "stop"])
def test_a_step_that_is_not_finite_never_reaches_the_parameters(tiny, delay, capsys, monkeypatch, action):
    (tiny.folder / "bad.py").write_text(BAD)
    monkeypatch.setenv("BAD", "5:nan")
    delay(1)
    saves = ["--checkpoint.interval_steps=3"]
    status = tiny.launch(*SMALL, *saves, f"--guard.on_nonfinite={action}")
    said = capsys.readouterr()
    assert "step 5 (samples 32 to 39): loss nan" in said.out + said.err
    assert status == (1 if action == "stop" else 0)
    newest = max((tiny.directory / "checkpoints").iterdir())
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(newest).values() if tensor.is_floating_point())
    if action == "stop":
        assert newest.name == "step-00000006", "the step that was under way is saved with it"


def test_the_device_skips_the_updates_that_the_host_would_skip(new_tiny, delay, monkeypatch):
    monkeypatch.setenv("BAD", "5:inf")
    runs = []
    for steps_later in (0, 1):
        run = new_tiny(str(steps_later))
        (run.folder / "bad.py").write_text(BAD)
        delay(steps_later)
        assert run.launch(*SMALL, "--guard.on_nonfinite=skip", "--checkpoint.interval_steps=none") == 0
        runs.append(run)
    now, later = (tensors(run.checkpoint(10)) for run in runs)
    assert now.keys() == later.keys()
    for name in now:
        # the average counts the unchanged weights for the skipped step if the host does not know it yet
        assert torch.equal(now[name], later[name]) != name.startswith("average."), name
