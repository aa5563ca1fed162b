"""Losses that are not finite or spike: the step is skipped, rolled back or ends the run, and its samples are logged."""

from __future__ import annotations

import pytest
import torch

from recipes.checkpointing import RunCheckpoints
from tests.checkpoints import rewrite_manifest
from tests.end_to_end.test_resume import tensors
from tests.faults.bad_files import flip

BAD = '''
import os
from models.llama import Llama


class Bad(Llama):
    """A Llama whose loss in some steps of the run, BAD="5:nan,7:1e3", is multiplied. Of four micro-batches each."""

    def build(self, **sizes):
        model = super().build(**sizes)
        forward, calls = model.forward, [0]
        factors = dict(pair.split(":") for pair in os.environ["BAD"].split(",") if pair)

        def bad(tokens, labels=None):
            out = forward(tokens, labels)
            if labels is not None and model.training:
                calls[0] += 1
                out = out * float(factors.get(str((calls[0] - 1) // 4 + 1), 1))
            return out

        model.forward = bad
        return model
'''
SMALL = ["--model.use=bad:Bad", "--model.size=debug", "--model.dim=16", "--model.layers=2", "--model.heads=2"]
SMALL += ["--model.kv_heads=1", "--model.head_dim=8", "--model.ffn_dim=32", "--training.total_tokens=1900"]
SMALL += ["--batch.use=components.batch:Constant", "--batch.initial_size=8", "--validation.interval_steps=none"]
SMALL += ["--average.ema.use=components.average:Exponential", "--average.ema.half_life_tokens=900"]
"""Ten steps of eight samples."""
SPIKE = ["--guard.spike_window_steps=4"]


@pytest.fixture
def train(tiny, capsys, monkeypatch):
    """Runs with these bad steps; gives the status and what was said."""
    (tiny.folder / "bad.py").write_text(BAD)

    def run(bad: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setenv("BAD", bad)
        status = tiny.launch(*SMALL, *arguments)
        output = capsys.readouterr()
        assert "Traceback" not in output.out + output.err
        return status, output.out + output.err

    return run


def samples(tiny) -> list[int]:
    return [row["samples"] for row in tiny.rows() if "loss" in row]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("factor", ["nan", "inf", "1e4"])
def test_a_skipped_step_leaves_the_parameters_as_they_were(tiny, train, factor: str) -> None:
    status, said = train(f"6:{factor}", "--guard.on_nonfinite=skip", "--guard.on_spike=skip", *SPIKE)
    assert status == 0, said
    assert "step 6 (samples 40 to 47): loss" in said
    assert "update skipped" in said
    before, after = tensors(tiny.checkpoint(5)), tensors(tiny.checkpoint(6))
    assert all(
        torch.equal(before[name], after[name])
        for name in before
        if name.startswith(("model.", "optimizer.state", "average."))
    )
    assert samples(tiny) == list(range(8, 81, 8)), "the data continues"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("factor", ["nan", "1e4"])
def test_rolling_back_returns_to_the_checkpoint_and_skips_the_samples(tiny, train, factor: str) -> None:
    rules = ["--guard.on_nonfinite=roll_back", "--guard.on_spike=roll_back", *SPIKE, "--checkpoint.interval_steps=4"]
    status, said = train(f"7:{factor}", *rules)
    assert status == 0, said
    assert "step 7 (samples 48 to 55): loss" in said
    assert "rolled back to step-00000004; these samples are skipped" in said
    assert samples(tiny) == list(range(8, 81, 8)), "no sample is trained twice"
    losses = [row["loss"] for row in tiny.rows() if "loss" in row]

    # what was trained after it is what a run trains that starts at the checkpoint with the data of step 8
    state = tiny.checkpoint(4) / "state.json"
    text = state.read_text()
    at = '"step": 4,\n  "samples": 32,\n  "tokens": 768'
    assert at in text
    state.write_text(text.replace(at, '"step": 7,\n  "samples": 56,\n  "tokens": 1344'))
    rewrite_manifest(tiny.checkpoint(4))
    fork = tiny.folder / "fork"
    status, said = train("", f"--resume={tiny.checkpoint(4)}", f"--run.dir={fork}", "--checkpoint.interval_steps=none")
    assert status == 0, said
    tiny.directory = fork
    assert [row["loss"] for row in tiny.rows() if "loss" in row] == losses[7:]
    expected = tensors(tiny.folder / "run" / "checkpoints" / "step-00000010")
    found = tensors(tiny.checkpoint(10))
    assert all(torch.equal(found[name], expected[name]) for name in expected), "the average is rolled back, too"


def test_a_fork_rolls_back_to_the_checkpoint_it_started_from(tiny, train) -> None:
    assert train("", "--training.total_tokens=768")[0] == 0
    source = tiny.checkpoint(4)
    tiny.directory = tiny.folder / "fork"
    roll_back = ["--guard.on_nonfinite=roll_back", f"--run.dir={tiny.directory}", "--checkpoint.interval_steps=2"]
    status, said = train("1:nan", f"--resume={source}", *roll_back)
    assert status == 0, said
    assert "rolled back to step-00000004; these samples are skipped" in said and source.is_dir()


def test_a_damaged_checkpoint_is_passed_over_and_renamed(tiny, train, monkeypatch) -> None:
    save = RunCheckpoints.save

    def save_and_damage(checkpoints: RunCheckpoints) -> None:
        save(checkpoints)
        if checkpoints.state.clock.step == 4:
            flip("*.distcp")(tiny.checkpoint(4))

    monkeypatch.setattr(RunCheckpoints, "save", save_and_damage)
    roll_back = ["--guard.on_nonfinite=roll_back", "--checkpoint.interval_steps=2", "--checkpoint.keep_last=2"]
    status, said = train("5:nan", *roll_back)
    assert status == 0, said
    assert f"; using {tiny.checkpoint(2)}" in said and "rolled back to step-00000002" in said
    assert tiny.checkpoint(4).with_name("damaged-step-00000004").is_dir()


def test_without_a_checkpoint_there_is_nothing_to_return_to(tiny, train) -> None:
    status, said = train("2:nan", "--guard.on_nonfinite=roll_back", "--checkpoint.interval_steps=none")
    assert status == 0, said
    assert "there is no checkpoint to roll back to; update skipped" in said


def test_a_spike_can_stop_the_run_before_it_does_harm(tiny, train) -> None:
    status, said = train("6:1e4", "--guard.on_spike=stop", *SPIKE, "--checkpoint.interval_steps=none")
    assert status == 1
    assert "standard deviations above the mean" in said
    assert f"the last good checkpoint is {tiny.checkpoint(5)}" in said
    assert "--guard.on_spike=skip" in said


def test_bad_steps_without_end_end_the_run(tiny, train) -> None:
    bad = ",".join(f"{step}:nan" for step in range(3, 10))
    status, said = train(bad, "--guard.on_nonfinite=skip", "--guard.max_bad_steps=4")
    assert status == 1
    assert said.count("update skipped") == 3
    assert "step 6 (samples 40 to 47)" in said
    assert "consecutive bad steps: 4, which is guard.max_bad_steps" in said
