"""Branched training: each branch is the run one would start by hand; an interrupted measurement ends as a whole one."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from components.batch import Constant
from components.train_step import TrainStep
from recipes import cli
from recipes.builtin_hooks import Validate
from recipes.critical_batch.report import Branch, Report
from recipes.errors import NonFiniteError
from recipes.hooks import HookContext
from recipes.pretrain import Pretrain
from tests.conftest import TinyRun
from tests.end_to_end.test_resume import timeless
from tests.faults.test_removals import Others, moved_and_linked

FROM = 6
"""Step of the checkpoint: 56 samples of 24 tokens, and 12 in each step to come."""
RECIPE = "--recipe=recipes.critical_batch:CriticalBatch"
TOKENS = 2400
"""Five steps of 24 samples, rounded up: ten of 12."""
ROUNDED = 2880


class Measured:
    """A finished run, and measurements on its checkpoints."""

    def __init__(self, tiny: TinyRun) -> None:
        self.tiny = tiny
        self.directory = tiny.folder / "measured"
        self.arguments = [RECIPE, f"--run.dir={self.directory}", f"--branches.checkpoint={tiny.checkpoint(FROM)}"]
        self.arguments += [f"--branches.tokens={TOKENS}", "--branches.batch_multipliers=[1,2]"]
        self.arguments += ["--checkpoint.interval_steps=none"]

    def launch(self, *more: str) -> int:
        return self.tiny.launch(*self.arguments, *more)

    def json(self) -> dict:
        return json.loads((self.directory / "critical_batch.json").read_text())

    def rows(self, multiplier: int) -> list[dict]:
        metrics = self.directory / "branches" / f"k-{multiplier:03d}" / "metrics.jsonl"
        return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The run that every test measures a copy of."""
    run = TinyRun(tmp_path_factory.mktemp("finished"))
    assert run.launch() == 0
    return run


@pytest.fixture
def measured(tiny: TinyRun, finished: TinyRun) -> Measured:
    shutil.copytree(finished.directory, tiny.directory)
    return Measured(tiny)


def test_each_branch_is_a_run_resumed_by_hand(measured, capsys):
    tiny = measured.tiny
    before = tiny.rows()
    assert measured.launch() == 0
    said = capsys.readouterr().out
    assert tiny.rows() == before, "the original run is unchanged"
    clock = json.loads((tiny.checkpoint(FROM) / "state.json").read_text())["clock"]
    for multiplier, steps in ((1, 10), (2, 5)):
        hand = tiny.folder / f"hand-{multiplier}"
        status = tiny.launch(
            f"--resume={tiny.checkpoint(FROM)}",
            f"--run.dir={hand}",
            "--batch.use=components.batch:Constant",
            f"--batch.initial_size={12 * multiplier}",
            "--lr_schedule.use=components.lr_schedules:Constant",
            f"--lr_schedule.max_lr={0.01 * math.sqrt(multiplier)}",
            f"--training.total_tokens={clock['tokens'] + ROUNDED}",
            "--checkpoint.interval_steps=none",
        )
        assert status == 0
        rows = [json.loads(line) for line in (hand / "metrics.jsonl").read_text().splitlines()]
        assert timeless(measured.rows(multiplier)) == timeless(rows)
        assert len([row for row in rows if "loss" in row]) == steps

    found = measured.json()
    assert (found["batch"], found["lr"], found["tokens"]) == (12, 0.01, clock["tokens"])
    assert (found["branch_tokens"], found["smoothing_tokens"]) == (ROUNDED, ROUNDED // 4)
    for row, multiplier, steps in zip(found["branches"], (1, 2), (10, 5), strict=True):
        assert (row["k"], row["batch"], row["steps"]) == (multiplier, 12 * multiplier, steps)
        assert row["lr"] == pytest.approx(0.01 * math.sqrt(multiplier))
        losses = [step["loss"] for step in measured.rows(multiplier) if "loss" in step]
        keep = math.exp(-12 * multiplier * 24 / (ROUNDED / 4))
        weights = [keep ** (len(losses) - 1 - i) for i in range(len(losses))]
        wanted = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
        assert row["smoothed_loss"] == pytest.approx(wanted)
        assert row["val_loss"] == measured.rows(multiplier)[-1]["val_loss"]
    first, second = found["branches"]
    assert second["difference"] == second["smoothed_loss"] - first["smoothed_loss"]
    assert first["within_tolerance"]
    within = second["difference"] <= 0.01
    assert (second["within_tolerance"], found["is_lower_bound"]) == (within, within)
    assert found["k_star"] == 1 + within
    assert found["critical_batch_tokens"] == found["critical_batch"] * 24 == 12 * found["k_star"] * 24
    assert f"k* = {found['k_star']}" in said
    assert (measured.directory / "critical_batch.png").stat().st_size > 1000


class Killed(BaseException):
    """Like a kill, it cannot be caught."""


def at_its_step(count: int, sends):
    """`next_batch_size` of the constant batch, which calls `sends` at step `count` of the second branch."""
    asked = []

    def next_batch_size(self, progress):
        asked.append(self.initial_size)
        if self.initial_size == 24 and asked.count(24) == count:
            sends()
        return self.initial_size

    return next_batch_size


def kill(*_):
    raise Killed


@pytest.mark.parametrize("moment", ["after a save", "before its first save", "before its validation"])
def test_a_killed_measurement_ends_as_a_whole_one(measured, monkeypatch, moment):
    saves = "--checkpoint.interval_steps=" + ("100" if moment == "before its first save" else "2")
    assert measured.launch(saves) == 0
    whole = measured.json()
    rows = {multiplier: timeless(measured.rows(multiplier)) for multiplier in (1, 2)}
    shutil.rmtree(measured.directory)

    evaluate = Validate.evaluate
    with monkeypatch.context() as patch:
        if moment == "before its validation":

            def killed(hook: Validate, due: Sequence[Any], context: HookContext) -> dict[str, float]:
                if context.clock.done and hook.checkpoints.config.recipe.batch.initial_size == 24:
                    kill()
                return evaluate(hook, due, context)

            patch.setattr(Validate, "evaluate", killed)
        else:
            patch.setattr(Constant, "next_batch_size", at_its_step(4, kill))
        with pytest.raises(Killed):
            measured.launch(saves)
    assert not (measured.directory / "critical_batch.json").exists()
    finished = (measured.directory / "branches" / "k-001" / "metrics.jsonl").read_bytes()
    taken = []
    update = TrainStep.update
    monkeypatch.setattr(
        TrainStep, "update", lambda step, lr, *rest, **how: (taken.append(lr), update(step, lr, *rest, **how))[1]
    )
    assert measured.launch(saves) == 0
    assert measured.json() == whole
    assert (measured.directory / "branches" / "k-001" / "metrics.jsonl").read_bytes() == finished
    assert {multiplier: timeless(measured.rows(multiplier)) for multiplier in (1, 2)} == rows
    steps = {"after a save": 2, "before its first save": 5, "before its validation": 0}
    assert len(taken) == steps[moment], "it continues from its newest checkpoint"


def test_a_stopped_branch_stops_the_measurement_and_is_continued(measured, monkeypatch):
    assert measured.launch() == 0
    whole = measured.json()
    shutil.rmtree(measured.directory)
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "next_batch_size", at_its_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert measured.launch() == 128 + signal.SIGTERM
    assert len([row for row in measured.rows(2) if "loss" in row]) == 2
    assert not (measured.directory / "critical_batch.json").exists()
    assert measured.launch() == 0
    assert measured.json() == whole


def test_a_finished_measurement_is_compared_again_and_made_longer(measured):
    longer = f"--branches.tokens={ROUNDED + 576}"
    assert measured.launch(longer) == 0
    whole = measured.json()
    shutil.rmtree(measured.directory)
    assert measured.launch() == 0
    assert measured.launch(longer) == 0
    assert measured.json() == whole
    assert measured.launch("--resume", longer, "--branches.tolerance=9") == 0
    assert measured.json()["k_star"] == 2


def test_a_branch_that_diverges_is_reported_and_does_not_count(measured, monkeypatch):
    train = Pretrain.main

    def diverging(self, config, resume):
        if type(self) is Pretrain and self.batch.initial_size == 24:
            raise NonFiniteError("step 8: loss nan")
        return train(self, config, resume)

    monkeypatch.setattr(Pretrain, "main", diverging)
    assert measured.launch() == 0
    found = measured.json()
    assert found["branches"][1]["smoothed_loss"] is None
    assert not found["branches"][1]["within_tolerance"]
    assert (found["k_star"], found["critical_batch"], found["is_lower_bound"]) == (1, 12, False)


def test_batch_and_lr_are_those_of_the_next_step_or_of_the_keys(measured, capsys):
    """After step 4, of 8 samples, the ramp goes to 12; the last step but two is in the decay."""
    tiny = measured.tiny

    def planned(step: int, *more: str) -> list[str]:
        capsys.readouterr()
        assert measured.launch("--dry-run", f"--branches.checkpoint={tiny.checkpoint(step)}", *more) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["2"]).split()

    assert planned(3)[1] == "16"
    assert planned(4)[1] == "24"
    assert planned(4)[4] == f"{0.01 * math.sqrt(2):.3g}"
    decayed = tiny.rows()[-2]
    assert decayed["lr"] < 0.01
    assert planned(13)[4] == f"{decayed['lr'] * math.sqrt(2):.3g}"
    assert planned(13, "--branches.batch=5", "--branches.lr=0.5") == ["2", "12", "288", "9", "0.707"]  # 5 becomes 6
    assert not measured.directory.exists(), "a dry run writes nothing"


def test_print_config_is_launchable(measured, capsys):
    capsys.readouterr()
    assert measured.launch("--print-config") == 0
    printed = measured.tiny.folder / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert cli.main([str(printed), "--dry-run"]) == 0


def test_the_recipe_of_an_adaptive_run_need_not_measure_noise(measured):
    adaptive = ["--batch.use=components.batch:NoiseScale", "--batch.initial_size=8", "--batch.max_size=24"]
    assert measured.launch(*adaptive, "--gradient_noise.interval_steps=none", "--dry-run") == 0


def test_the_plot_is_optional(measured, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert measured.launch() == 0
    assert "pip install -e '.[plot]'" in capsys.readouterr().out
    assert measured.json()["k_star"] in (1, 2)
    assert not (measured.directory / "critical_batch.png").exists()


def refused(measured, capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert measured.launch(*arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "1 problem; nothing was started." in error
    return error


def test_mistakes_are_reported_in_one_message(measured, capsys):
    tiny = measured.tiny
    source = tiny.checkpoint(FROM)
    for dry in ([], ["--dry-run"]):
        assert "is not a directory" in refused(measured, capsys, "--branches.checkpoint=nowhere", *dry)
        assert "neither a checkpoint nor" in refused(measured, capsys, f"--branches.checkpoint={tiny.folder}", *dry)
        assert "do not start at 1" in refused(measured, capsys, "--branches.batch_multipliers=[2,4]", *dry)
        assert "do not start at 1" in refused(measured, capsys, "--branches.batch_multipliers=[]", *dry)
        assert "do not increase" in refused(measured, capsys, "--branches.batch_multipliers=[1,4,4]", *dry)
        assert "branches.tokens" in (said := refused(measured, capsys, "--branches.tokens=575", *dry))
        assert "less than one step of 576 tokens at k = 2" in said
        assert "model.dim" in (said := refused(measured, capsys, "--model.dim=32", *dry))
        assert "does not fit this setting" in said
        assert "directory of this run" in refused(measured, capsys, f"--run.dir={tiny.directory}", *dry)
        end = f"--branches.checkpoint={tiny.directory}"
        assert "is 0.0; set branches.lr" in refused(measured, capsys, end, *dry)
    for name in (".metadata", "config.toml"):
        partial = tiny.folder / f"without-{name}"
        shutil.copytree(source, partial)
        (partial / name).unlink()
        said = refused(measured, capsys, f"--branches.checkpoint={partial}")
        assert f"is damaged: {name} is missing" in said
        assert "branches.checkpoint" in said
    assert not measured.directory.exists()


def test_a_training_run_is_never_replaced_by_a_measurement(measured, capsys):
    """debug.toml says replace, and a measurement that extends it may forget the name."""
    other = measured.tiny.folder / "other"
    shutil.copytree(measured.tiny.directory, other)
    said = refused(measured, capsys, f"--run.dir={other}", "--run.if_exists=replace")
    assert "holds a training run" in said
    assert (other / "checkpoints").is_dir()


def test_a_measurement_behind_links_replaces_only_what_one_wrote(measured, capsys):
    others = Others(measured.tiny.folder)
    assert measured.launch("--branches.batch_multipliers=[1]") == 0
    branches = measured.directory / "branches"
    others.write(branches / "notes.md", branches / "k-001" / "notes.md", branches / "k-777" / "metrics.jsonl")
    others.write(measured.directory / "photograph.png")
    moved_and_linked(branches, measured.tiny.folder / "elsewhere")
    moved_and_linked(branches / "k-001" / "checkpoints", measured.tiny.folder / "elsewhere")
    again = ["--run.if_exists=replace", "--branches.batch_multipliers=[1]"]
    inside = f"--branches.checkpoint={measured.tiny.folder / 'elsewhere' / 'checkpoints'}"
    assert "is in the directory of this run" in refused(measured, capsys, *again, inside)
    assert measured.launch(*again, "--branches.lr=0.02") == 0
    assert measured.json()["lr"] == 0.02 and branches.is_symlink()
    assert others.are_all_there()
    # Nor does a training run write over it.
    assert measured.tiny.launch(f"--run.dir={measured.directory}", "--run.if_exists=replace") == 2
    assert "holds a measurement" in capsys.readouterr().err


def test_another_measurement_is_refused_unless_it_replaces(measured, monkeypatch, capsys):
    assert "branches.checkpoint names the checkpoint" in refused(
        measured, capsys, f"--resume={measured.tiny.directory}"
    )
    assert measured.launch("--branches.batch_multipliers=[1]") == 0
    assert "started from" in refused(measured, capsys, "--branches.lr=0.02")
    assert "in the existing branches" in refused(measured, capsys, "--optimizer.weight_decay=0.0")
    with monkeypatch.context() as patch:
        patch.setattr(Pretrain, "main", kill)
        with pytest.raises(Killed):
            measured.launch("--run.if_exists=replace", "--branches.lr=0.02")
    assert not (measured.directory / "critical_batch.json").exists(), "it was of another measurement"
    assert measured.launch("--run.if_exists=replace", "--branches.lr=0.02", "--branches.batch_multipliers=[1]") == 0
    assert measured.json()["lr"] == 0.02
    assert not (measured.directory / "branches" / "k-002").exists()


@pytest.mark.quick
def test_a_branch_with_a_skipped_step_is_not_within_tolerance():
    losses = {1: (3.0, 2.9), 2: (3.0, math.nan)}
    branches = [Branch(k, 8 * k, 64 * k, 0.1, 2, each, None, {}) for k, each in losses.items()]
    report = Report(tuple(branches), 100, 0.01, 8)
    assert report.multiplier == 1
    assert report.summary()["branches"][1]["smoothed_loss"] is None


@pytest.mark.quick
def test_the_noise_scale_is_the_median_of_what_was_measured_in_the_first_branch():
    def branch(multiplier: int, noise: tuple[float, ...], in_adam: tuple[float, ...] = ()) -> Branch:
        scales = {"noise_scale": noise, "noise_scale_adam": in_adam}
        return Branch(multiplier, 8 * multiplier, 64 * multiplier, 0.1, 2, (3.0, 3.0), None, scales)

    report = Report((branch(1, (40.0, 10.0, 90.0)), branch(2, (1.0,))), 100, 0.01, 8)
    assert report.summary()["noise_scale"] == 40.0
    assert "noise scale of the branch k = 1: 40 samples" in (said := "\n".join(report.lines()))
    assert "Adam" not in said
    report = Report((branch(1, (40.0,), (7.0, 9.0)),), 100, 0.01, 8)
    assert report.summary()["noise_scale_adam"] == 8.0
    assert "noise scale of the branch k = 1, in the norm of Adam: 8 samples" in "\n".join(report.lines())
    report = Report((branch(1, ()), branch(2, (1.0,))), 100, 0.01, 8)
    assert report.summary()["noise_scale"] is None
    assert "noise scale of the branch k = 1: not measured" in "\n".join(report.lines())
