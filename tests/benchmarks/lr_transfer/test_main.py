"""The comparison of ways to set a learning rate: its runs are recipes, and its report agrees with its runs."""

from __future__ import annotations

import math
import shutil

import pytest

from benchmarks.lr_transfer.__main__ import main
from benchmarks.lr_transfer.methods import BASE_WIDTH, METHODS, Grid, relative_cost, sweep_of
from recipes.cli import ROOT
from recipes.config import Override, load
from tests.tools.sweep.outcomes import pretend

pytestmark = pytest.mark.quick


@pytest.fixture
def text(tmp_path):
    """Text to train and validate on and a tokenizer; their content does not matter."""
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("It was the best of times.")
    return {
        "data.path": tmp_path / "train",
        "validation.data.path": tmp_path / "valid",
        "tokenizer.path": shutil.copy(ROOT / "assets" / "tokenizers" / "stdlib-4096.tiktoken", tmp_path / "tokens"),
    }


@pytest.mark.slow
def test_every_method_tries_every_lr_in_every_group(text):
    grid = Grid(widths=(64, 256), tokens=(300_000,), seeds=2)
    digests = set()
    for method in METHODS:
        jobs = sweep_of(method, grid, text).jobs()
        assert len(jobs) == 2 * 2 * len(method.lrs) * 2
        digests |= {job.digest for job in jobs}
        recipe = load(jobs[-1].recipe, [Override(*item) for item in jobs[-1].settings.items()]).recipe
        assert (recipe.model.resolved_shape.mup is not None) == ("muP" in method.name)
        assert type(recipe.lr_schedule).__name__ == method.name.split(",")[0]
        assert recipe.lr_schedule.warmup_tokens == 60_000
        assert relative_cost(jobs[0]) <= min(map(relative_cost, jobs)) < max(map(relative_cost, jobs))
    assert len(digests) == 2 * 4 * sum(len(method.lrs) for method in METHODS)


@pytest.mark.slow
def test_the_report_shows_which_lr_transfers_and_which_drifts(text, tmp_path, monkeypatch, capsys):
    """The best learning rate is inverse to width without muP, linear in the batch under WSD, fixed under Power."""
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    pytest.importorskip("scipy", reason="needs the [plot] extra")

    def loss(settings):
        width, batch = int(settings["model.dim"]), int(settings["batch.initial_size"])
        if "lr_schedule.a" in settings:
            return 4 + 0.1 * math.log(float(settings["lr_schedule.a"]) / 4) ** 2
        best = 2e-3 * (batch / 8) * (1 if "model.mup.base_width" in settings else BASE_WIDTH / width)
        return 4 + 0.1 * math.log(float(settings["lr_schedule.max_lr"]) / best) ** 2

    launched = pretend(monkeypatch, loss)
    command = [
        "--train",
        "train",
        "--valid",
        "valid",
        "--tokenizer",
        "tokens",
        "--widths",
        "128",
        "256",
        "--tokens",
        "1200000",
    ]
    places = ["--results", str(tmp_path / "results.jsonl"), "--picture", str(tmp_path / "new" / "a.svg")]
    monkeypatch.chdir(tmp_path)
    assert main([*command, *places]) == 0
    said = capsys.readouterr().out
    assert len(launched) == 4 * sum(len(method.lrs) for method in METHODS)
    assert "Power, muP: the best lr_schedule.a of a group is from 4 to 4; the one setting 4 is within 1%" in said
    assert (
        "in 4 of 4 groups, at the worst 0.0% above it, and of the best of all methods in 4, at the worst 0.0%" in said
    )
    assert "WSD, muP: the best lr_schedule.max_lr of a group is from 0.002 to 0.008" in said
    assert "WSD: the best lr_schedule.max_lr of a group is from 0.002 to 0.016" in said
    assert "| 128 | 32 | 1,200,000 |" in said
    assert (tmp_path / "new" / "a.svg").exists()
    assert main([*command, *places, "--report"]) == 0
    assert capsys.readouterr().out == said


def test_missing_text_is_reported(text, tmp_path, capsys):
    assert main(["--train", "no", "--valid", "no", "--tokenizer", "no", "--results", str(tmp_path / "r")]) == 2
    assert "no" in capsys.readouterr().err
