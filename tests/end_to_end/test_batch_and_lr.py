"""Runs whose batch, learning rate and optimizer depend on each other: as in the dry run, and equal after a resume."""

from __future__ import annotations

import shutil

import pytest

from tests.end_to_end.test_resume import assert_same_state, timeless

RULE = ["--lr_schedule.batch_scaling=sqrt", "--lr_schedule.reference_batch_tokens=96"]
SEESAW = [
    "--batch.use=components.batch:Seesaw",
    "--batch.initial_size=4",
    "--batch.max_size=12",
    "--batch.factor=1.5",
    "--lr_schedule.use=components.lr_schedules:Cosine",
    "--lr_schedule.max_lr=1e-2",
    "--lr_schedule.warmup_tokens=300",
    "--lr_schedule.min_lr_ratio=0",
    *RULE,
    "--optimizer.reference_batch_tokens=96",
]


def steps(tiny) -> list[dict]:
    return [row for row in tiny.rows() if "loss" in row]


MEASURED = [
    "--batch.initial_size=4",
    "--batch.max_size=40",
    "--batch.multiple_of=2",
    "--gradient_noise.smoothing_samples=50",
]
UNBIASED = ["--batch.use=components.batch:NormTest", "--batch.eta=0.5", "--batch.max_growth=2"]
PAPER = ["--batch.use=components.batch:NormTest", "--batch.eta=0.5", "--batch.estimator=paper"]
SCALE = ["--batch.use=components.batch:NoiseScale", "--batch.shrink=true", "--batch.coefficient=4"]
POLICIES = {
    "seesaw": SEESAW,
    "unbiased": [*MEASURED, *UNBIASED, *RULE],
    "paper": [*MEASURED, *PAPER],
    "noise scale": [*MEASURED, *SCALE, "--optimizer.reference_batch_tokens=96"],
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", POLICIES)
def test_a_run_resumed_between_batch_changes_equals_an_uninterrupted_one(tiny, tmp_path, name):
    policy = POLICIES[name]
    assert tiny.launch(*policy) == 0
    rows, last = tiny.rows(), steps(tiny)[-1]["step"]
    batches = [row["global_batch_size"] for row in steps(tiny)]
    changes = [step for step in range(1, last) if batches[step] != batches[step - 1]]
    assert batches[0] == 4 and changes, batches
    if name != "noise scale":
        assert batches == sorted(batches)
    whole = tmp_path / "whole"
    tiny.directory.rename(whole)
    # right where the first change was decided, and after the last
    for stopped_at in {changes[0], min(changes[-1] + 1, last - 1)}:
        shutil.copytree(whole, tiny.directory)
        for later in range(stopped_at + 1, last + 1):
            shutil.rmtree(tiny.checkpoint(later))
        assert tiny.launch("--resume", "--checkpoint.interval_steps=none", *policy) == 0
        assert timeless(tiny.rows()) == timeless(rows), f"resumed at {stopped_at}"
        assert_same_state(tiny.checkpoint(last), whole / "checkpoints" / f"step-{last:08d}")
        shutil.rmtree(tiny.directory)


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_a_batch_that_needs_noise_that_is_never_measured_is_refused(tiny, capsys, how):
    assert tiny.launch(*POLICIES["unbiased"], "--gradient_noise.interval_steps=none", *how) == 2
    said = "".join(capsys.readouterr())
    assert "gradient_noise.interval_steps" in said
    assert "NormTest needs the gradient noise" in said
    assert not tiny.directory.exists()


def test_the_dry_run_shows_the_schedule_of_seesaw(tiny, capsys):
    assert tiny.launch(*SEESAW, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert tiny.launch(*SEESAW) == 0
    rows = steps(tiny)
    assert f"in {len(rows)} steps" in shown
    assert f"{rows[-1]['lr']:.3g}" in shown


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_seesaw_without_batch_scaling_is_reported_at_its_section(tiny, capsys, how):
    without = [argument for argument in SEESAW if argument not in RULE]
    assert tiny.launch(*without, *how) == 2
    said = "".join(capsys.readouterr())
    assert 'Seesaw needs lr_schedule.batch_scaling = "sqrt" with reference_batch_tokens = 96' in said
    assert not (tiny.directory / "metrics.jsonl").exists()


def test_power_with_batch_scaling_is_reported_at_its_key(tiny, capsys):
    assert tiny.launch("--lr_schedule.use=components.lr_schedules:Power", *RULE) == 2
    assert "lr_schedule.batch_scaling" in (said := capsys.readouterr().err)
    assert "Power already scales linearly with the batch" in said


def test_an_optimizer_option_changed_on_resume_takes_effect(tiny, tmp_path):
    """The log announces the change; the checkpoint's own options must not win over it."""
    assert tiny.launch() == 0
    whole, losses = steps(tiny)[-1]["loss"], {}
    checkpoint = tiny.checkpoint(5)
    for decay in ("0.1", "50"):
        tiny.directory = tmp_path / f"fork-{decay}"
        fork = [f"--resume={checkpoint}", f"--run.dir={tiny.directory}", f"--optimizer.weight_decay={decay}"]
        assert tiny.launch(*fork) == 0
        losses[decay] = steps(tiny)[-1]["loss"]
    assert losses["0.1"] == whole != losses["50"]
