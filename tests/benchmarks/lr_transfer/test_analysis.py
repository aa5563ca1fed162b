"""The analysis of a sweep of learning rates: its table, its law and its figure."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from benchmarks.lr_transfer.analysis import main
from components.units import parse_count
from tests.tools.sweep.outcomes import LENGTH, pretend
from tools.sweep.__main__ import main as run_sweep

pytest.importorskip("scipy", reason="needs the [plot] extra")
pytestmark = pytest.mark.quick

GRIDS = [
    "--grid", "training.total_tokens=300K,1.2M,5M",
    "--grid", "batch.initial_size=8,32",
    "--grid", "lr_schedule.max_lr=" + ",".join(str(2.0**power) for power in range(-14, -3)),
]  # fmt: skip
CONSTANT = ["--batch.use=components.batch.constant:Constant"]


def analyzed(command: list[str], capsys) -> str:
    """Run the sweep of a command, and return what its analysis prints."""
    assert run_sweep(command) == 0
    capsys.readouterr()
    assert main(command) == 0
    return capsys.readouterr().out


def law_abiding(settings) -> float:
    """A valley whose best learning rate is that of the published law."""
    tokens, batch = parse_count(settings["training.total_tokens"]), int(settings["batch.initial_size"])
    best = batch * LENGTH / 4096 * 4.6 * tokens**-0.51
    return 4 + 0.1 * math.log(float(settings["lr_schedule.max_lr"]) / best) ** 2


@pytest.mark.slow
def test_the_law_is_recovered_from_runs_that_follow_it(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    launched = pretend(monkeypatch, law_abiding)
    command = [str(tiny.recipe), *GRIDS, *CONSTANT, "--results", str(tmp_path / "results.jsonl"), "--jobs", "2"]
    assert run_sweep(command) == 0
    capsys.readouterr()
    assert main([*command, "--output", str(tmp_path / "a.svg")]) == 0
    said = capsys.readouterr().out
    assert len(launched) == 66 and "66 of 66 runs are done, 0 of them failed" in said
    # tokens are rounded up to whole steps: the law is off by as much
    assert re.search(r"b = -0.5(09|1|11) \(.* to .*\); published -0.51", said), said
    assert "beta^c has c = 1 (" in said
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_the_law_uses_the_applied_lr(tiny, tmp_path, monkeypatch, capsys):
    """With batch scaling the best `max_lr` does not depend on the batch, since it is for the reference batch."""
    rule = ["--lr_schedule.batch_scaling=linear", "--lr_schedule.reference_batch_tokens=4096"]

    def loss(settings):
        best = 4.6 * parse_count(settings["training.total_tokens"]) ** -0.51
        return 4 + 0.1 * math.log(float(settings["lr_schedule.max_lr"]) / best) ** 2

    pretend(monkeypatch, loss)
    said = analyzed([str(tiny.recipe), *GRIDS, *CONSTANT, *rule, "--results", str(tmp_path / "results.jsonl")], capsys)
    assert re.search(r"b = -0.5(09|1|11) \(.* to .*\); published -0.51", said), said
    assert "beta^c has c = 1 (" in said


@pytest.mark.slow
def test_a_cap_that_does_not_bind_has_no_law(tiny, tmp_path, monkeypatch, capsys):
    power = ["--lr_schedule.use=components.lr_schedules:Power", "--lr_schedule.warmup_tokens=300"]
    pretend(monkeypatch, law_abiding, lr=lambda settings: 1e-3)
    said = analyzed([str(tiny.recipe), *GRIDS, *CONSTANT, *power, "--results", str(tmp_path / "results.jsonl")], capsys)
    assert "in 6 groups the peak learning rate is not a fixed multiple of the tuned one" in said
    assert "no law of the best learning rates" in said


def test_the_table_shows_each_group_and_the_cost_of_one_lr(tiny, tmp_path, monkeypatch, capsys):
    losses = {("16", "1e-3"): 2.0, ("16", "2e-3"): 1.0, ("16", "4e-3"): 1.5, ("32", "1e-3"): 4.0, ("32", "2e-3"): 4.04}

    def loss(settings):
        return losses.get((settings["model.dim"], settings["lr_schedule.max_lr"]), 5.0)

    pretend(monkeypatch, loss)
    grids = ["--grid", "lr_schedule.max_lr=1e-3,2e-3,4e-3", "--grid", "model.dim=16,32", "--grid", "run.seed=0,1"]
    said = analyzed([str(tiny.recipe), *grids, "--results", str(tmp_path / "results.jsonl")], capsys)
    assert "| 16 | 2.000 | **1.000** | 1.500 | 0.002 | 0.00224 " in said
    assert "| 32 | **4.000** | 4.040 | 5.000 | 0.001 | below the grid |" in said
    assert "one lr_schedule.max_lr for all groups: 0.002, at the worst 1.00% above the best of a group" in said
    assert "no law of the best learning rates: the law needs three groups or more" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "model.dim=16,32"], "lr_schedule.max_lr or lr_schedule.a is not varied by a --grid"),
        (["--grid", "model.dim=16,32", "--lr-key", "optimizer.lr"], "optimizer.lr is not varied"),
        (["--grid", "lr_schedule.decay=linear,cosine", "--lr-key", "lr_schedule.decay"], "linear is not a number"),
        ([], "is not varied by a --grid"),
    ],
)
def test_a_sweep_without_a_learning_rate_is_refused(tiny, tmp_path, capsys, arguments, said):
    assert main([str(tiny.recipe), *arguments, "--results", str(tmp_path / "results.jsonl")]) == 2
    assert said in capsys.readouterr().err
