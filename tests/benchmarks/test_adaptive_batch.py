"""The comparison of batch policies: what it remembers, how it tunes, and what it reads off a curve."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.adaptive_batch import __main__ as comparison
from benchmarks.adaptive_batch import methods, runs
from benchmarks.adaptive_batch.runs import Book, Job, Result, curve_of

pytestmark = pytest.mark.quick

ROW = ("constant 8", "wsd")


@pytest.fixture
def trained(monkeypatch):
    """Runs whose loss is the distance of the rate from 0.012; the jobs that were run."""
    jobs = []

    def train(job, text):
        jobs.append(job)
        return Result(abs(job.rate - 0.012), steps=10, samples=80, seconds=1.0, curve=[(1, 100, 5.0, 8)])

    monkeypatch.setattr(runs, "train", train)
    return jobs


def test_tuning_goes_on_while_the_best_rate_is_at_the_edge(trained, tmp_path):
    book = Book(tmp_path / "results", {}, final_tokens=1000)
    with ThreadPoolExecutor(1) as pool:
        assert comparison.tune(book, pool, [ROW], 500) == {ROW: 0.008}
    assert sorted(job.rate for job in trained) == [0.001, 0.002, 0.004, 0.008, 0.016]


def test_what_is_in_the_file_is_not_run_again_unless_it_was_set_up_otherwise(trained, tmp_path, monkeypatch):
    job = Job(*ROW, 0.004, 0, 1000)
    first = Book(tmp_path / "results", {}, final_tokens=1000).run(job)
    again = Book(tmp_path / "results", {}, final_tokens=1000)
    assert again.run(job).val_loss == first.val_loss
    assert len(trained) == 1
    assert [result.val_loss for result in again.finals(ROW, 1000)] == [first.val_loss]
    monkeypatch.setitem(methods.SIZE, "model.layers", 7)
    Book(tmp_path / "results", {}, final_tokens=1000).run(job)
    assert len(trained) == 2


def test_a_curve_is_smoothed_alike_whatever_the_batch():
    """Twice the batch, half the steps: the same tokens, the same mean."""
    small = [{"step": i, "tokens": 10 * i, "loss": 5.0 - i / 100, "global_batch_size": 1} for i in range(1, 401)]
    large = [{**row, "step": row["step"] // 2, "global_batch_size": 2} for row in small if row["step"] % 2 == 0]
    fine, coarse = curve_of(small, 200)[-1], curve_of(large, 200)[-1]
    assert fine[1:2] == coarse[1:2] == (4000,)
    assert fine[2] == pytest.approx(coarse[2], abs=0.01)
    assert fine[2] == pytest.approx(small[-1]["loss"] + 0.2, abs=0.01)  # an average lags by its window


def test_steps_to_a_loss_are_those_of_its_first_reaching():
    result = Result(1.0, curve=[(10, 1, 5.0, 8), (20, 2, 4.0, 8), (30, 3, 4.5, 8), (40, 4, 3.0, 8)])
    assert result.steps_to(4.2) == 20
    assert result.steps_to(2.0) is None


EVERY = [(name, kind) for name in [*methods.METHODS, "constant 20"] for kind in ("wsd", "power", "cosine")]


@pytest.mark.parametrize("name, kind", [row for row in EVERY if row != ("Seesaw", "power")])  # refused by design
def test_every_method_is_a_recipe(name, kind, tmp_path):
    """Up to what needs the text: keys, types and cross-checks."""
    from recipes import launch

    settings = runs.settings_of(Job(name, kind, 0.002, 0, 100_000))
    recipe = runs.ROOT / "train_configs" / "own_text.toml"
    extra = ["--tokenizer.path=x", "--data.path=x", "--validation.data.path=x", f"--run.dir={tmp_path / 'run'}"]
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    assert launch.main([str(recipe), *arguments, *extra, "--lr_schedule.warmup_tokens=0", "--print-config"]) == 0
