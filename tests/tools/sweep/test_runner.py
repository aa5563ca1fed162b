"""Which jobs are run, stored, and run again."""

from __future__ import annotations

import json
import math

import pytest

from components.run_directory import RunDirectory
from recipes.config import ConfigError
from recipes.config.errors import Problem
from tests.tools.sweep.outcomes import pretend
from tools.sweep.grid import Job, Sweep, parse_grid
from tools.sweep.outcome import Outcome, measure, sample_curve, smoothed_losses
from tools.sweep.runner import Results, Runner, failure_reason

pytestmark = pytest.mark.quick


@pytest.fixture
def jobs(tiny) -> list[Job]:
    return Sweep(tiny.recipe, {}, [parse_grid(["lr_schedule.max_lr=1e-3,2e-3,4e-3"])]).jobs()


def rate(settings) -> float:
    return float(settings["lr_schedule.max_lr"])


def test_stored_runs_are_not_run_again(jobs, tmp_path, monkeypatch):
    launched = pretend(monkeypatch, rate)
    path = tmp_path / "new" / "results.jsonl"
    assert Runner(Results(path)).run(jobs[:2]) == 0
    assert Runner(Results(path), at_a_time=2).run(jobs) == 0
    assert [rate(settings) for settings in launched] == [1e-3, 2e-3, 4e-3]
    assert [Results(path).get(job).loss for job in jobs] == [1e-3, 2e-3, 4e-3]
    assert all("path" not in key for line in path.read_text().splitlines() for key in json.loads(line)["settings"])


def test_the_run_of_an_incomplete_line_is_run_again_and_replaced(jobs, tmp_path, monkeypatch):
    launched = pretend(monkeypatch, rate)
    path = tmp_path / "results.jsonl"
    Runner(Results(path)).run(jobs[:2])
    path.write_text(path.read_text()[:-20])
    Runner(Results(path)).run(jobs)
    assert [rate(settings) for settings in launched] == [1e-3, 2e-3, 2e-3, 4e-3]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3
    assert all(Results(path).get(job) for job in jobs)


@pytest.mark.parametrize("status", [-9, 130, 137, 143])
def test_a_killed_run_is_not_stored(jobs, tmp_path, monkeypatch, capsys, status):
    pretend(monkeypatch, rate, status)
    path = tmp_path / "results.jsonl"
    assert Runner(Results(path)).run(jobs) == 3
    assert not path.exists()
    assert "killed; the next start runs it again" in capsys.readouterr().err


def test_a_failed_run_is_stored_with_its_reason_and_run_again_on_request(jobs, tmp_path, monkeypatch):
    said = "step 7\nstep 8 (samples 56 to 63): loss nan, gradient norm 1.0. The parameters were not updated; the last\n"
    launched = pretend(monkeypatch, rate, 1, said)
    path = tmp_path / "results.jsonl"
    assert Runner(Results(path)).run(jobs) == 0
    outcome = Results(path).get(jobs[0])
    assert outcome.failure == "step 8 (samples 56 to 63): loss nan, gradient norm 1.0"
    assert outcome.loss == math.inf
    Runner(Results(path)).run(jobs)
    assert len(launched) == 3
    Runner(Results(path)).run(jobs, again=True)
    assert len(launched) == 6


def test_bad_input_ends_the_sweep_and_names_the_run(jobs, tmp_path, monkeypatch):
    launched = pretend(monkeypatch, rate, 2, "no such tokenizer\n")
    with pytest.raises(ValueError, match=r"with lr_schedule\.max_lr = 1e-3:\nno such tokenizer"):
        Runner(Results(tmp_path / "results.jsonl")).run(jobs)
    assert len(launched) == 1


def test_a_run_that_fails_after_its_start_by_its_settings_is_stored(jobs, tmp_path, monkeypatch):
    """For example out of memory: the other runs may have enough."""
    problem = Problem("command line", "training.micro_batch_size", "out of memory. Take\nless", "64")
    error = ConfigError([problem], started=True)
    launched = pretend(monkeypatch, rate, 2, f"step 1\n{error}\n", error=error.fields())
    path = tmp_path / "results.jsonl"
    assert Runner(Results(path)).run(jobs) == 0
    assert len(launched) == 3
    assert Results(path).get(jobs[0]).failure == "out of memory"


def test_run_directories_are_kept_on_request_and_otherwise_have_no_checkpoints(jobs, tmp_path, monkeypatch):
    launched = pretend(monkeypatch, rate)
    Runner(Results(tmp_path / "a.jsonl"), keep_in=tmp_path / "kept").run(jobs)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(job.digest for job in jobs)
    Runner(Results(tmp_path / "b.jsonl")).run(jobs)
    assert ["checkpoint.interval_steps" in settings for settings in launched] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("text", ["nonsense\n", '{"digest": "a"}\n', '{"digest": "a", "outcome": {"x": 1}}\n'])
def test_a_file_with_other_content_is_refused(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.jsonl:1 is not a result of a sweep"):
        Results(path)


def test_the_reason_is_the_first_sentence_of_the_last_line():
    assert failure_reason("a\nb. c. d\n\n") == "b"
    assert failure_reason("\n") == "no output"


def test_a_skipped_step_does_not_spoil_the_loss(tmp_path):
    rows = [{**row, "step_seconds": 1.0, "lr": 0.1} for row in steps_of(4, 400)]
    rows[5]["loss"] = None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_gap = measure(RunDirectory(tmp_path), None, curve_points=400)
    assert with_gap.loss == pytest.approx(smoothed_losses(steps_of(4, 400), 320)[-1], rel=1e-3)
    assert all(math.isfinite(loss) for _, _, loss, _ in with_gap.curve)


def test_a_loss_that_is_not_finite_at_the_end_is_a_failure(tmp_path):
    row = {"step": 1, "samples": 8, "tokens": 80, "loss": 2.0, "global_batch_size": 8, "step_seconds": 1.0, "lr": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"step": 1, "val_loss": None}) + "\n")
    assert measure(RunDirectory(tmp_path), None).failure == "the final loss is not finite"
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert measure(RunDirectory(tmp_path), None) == Outcome(None, 2.0, 1, 8, 80, 1.0, peak_lr=0.5)


def steps_of(batch: int, count: int) -> list[dict]:
    """Steps of `batch` samples of 10 tokens, whose loss falls with the tokens."""
    return [
        {"step": i, "samples": n, "tokens": 10 * n, "loss": 5 - n / 100, "global_batch_size": batch}
        for i in range(1, count + 1)
        for n in [batch * i]
    ]


def test_losses_are_smoothed_alike_whatever_the_batch():
    fine, coarse = smoothed_losses(steps_of(1, 400), 200), smoothed_losses(steps_of(2, 200), 200)
    assert fine[-1] == pytest.approx(coarse[-1], abs=0.01)
    assert fine[-1] == pytest.approx(1.0 + 0.2, abs=0.01)  # an average lags by its window


@pytest.mark.parametrize(("points", "wanted"), [(0, []), (3, [1, 4, 7]), (7, [1, 2, 3, 4, 5, 6, 7]), (2, [3, 7])])
def test_a_curve_ends_with_the_last_step_and_has_no_more_points_than_asked_for(points, wanted):
    rows = steps_of(4, 7)
    found = sample_curve(rows, [row["loss"] for row in rows], points)
    assert found == [(step, 40 * step, round(5 - 4 * step / 100, 5), 4) for step in wanted]


def test_steps_to_a_loss_end_where_it_is_first_reached():
    outcome = Outcome(curve=[(10, 1, 5.0, 8), (20, 2, 4.0, 8), (30, 3, 4.5, 8), (40, 4, 3.0, 8)])
    assert outcome.steps_to(4.2) == 20
    assert outcome.steps_to(2.0) is None
