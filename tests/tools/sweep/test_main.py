"""The command, from grids to the law; once with real runs."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from components.units import parse_count
from recipes.cli import ROOT
from tests.processes import start_process, wait_until
from tests.tools.sweep.outcomes import LENGTH, pretend
from tools.sweep.__main__ import main
from tools.sweep.runs import stopped

GRIDS = [
    "--grid", "training.total_tokens=300K,1.2M,5M",
    "--grid", "batch.initial=8,32",
    "--grid", "lr_schedule.max_lr=" + ",".join(str(2.0**power) for power in range(-14, -3)),
]  # fmt: skip
CONSTANT = ["--batch.use=components.batch:Constant"]


def law_abiding(settings) -> float:
    """A valley whose best rate is that of the published law."""
    tokens, batch = parse_count(settings["training.total_tokens"]), int(settings["batch.initial"])
    best = batch * LENGTH / 4096 * 4.6 * tokens**-0.51
    return 4 + 0.1 * math.log(float(settings["lr_schedule.max_lr"]) / best) ** 2


@pytest.mark.quick
def test_the_law_is_found_in_runs_that_obey_it(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    launched = pretend(monkeypatch, law_abiding)
    command = [str(tiny.recipe), *GRIDS, *CONSTANT, "--results", str(tmp_path / "results.jsonl"), "--jobs", "2"]
    assert main([*command, "--output", str(tmp_path / "a.svg")]) == 0
    said = capsys.readouterr().out
    assert len(launched) == 66 and "66 of 66 runs are done, 0 of them failed" in said
    # tokens are rounded up to whole steps: the law is off by as much
    assert re.search(r"b = -0.5(09|1|11) \(.* to .*\); published -0.51", said), said
    assert "beta^c has c = 1 (" in said
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert main([*command, "--report"]) == 0
    assert capsys.readouterr().out == said.split("\nwrote")[0]
    assert len(launched) == 66


@pytest.mark.quick
def test_the_law_is_that_of_the_rate_that_was_applied(tiny, tmp_path, monkeypatch, capsys):
    """Under a rule for the batch: the best `max_lr` does not follow the batch, as its reference says what it is for."""
    rule = ["--lr_schedule.batch_rule=linear", "--lr_schedule.reference_batch_tokens=4096"]

    def loss(settings):
        best = 4.6 * parse_count(settings["training.total_tokens"]) ** -0.51
        return 4 + 0.1 * math.log(float(settings["lr_schedule.max_lr"]) / best) ** 2

    pretend(monkeypatch, loss)
    assert main([str(tiny.recipe), *GRIDS, *CONSTANT, *rule, "--results", str(tmp_path / "results.jsonl")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"b = -0.5(09|1|11) \(.* to .*\); published -0.51", said), said
    assert "beta^c has c = 1 (" in said


@pytest.mark.quick
def test_a_cap_that_does_not_bind_has_no_law(tiny, tmp_path, monkeypatch, capsys):
    power = ["--lr_schedule.use=components.lr_schedules:Power", "--lr_schedule.warmup_tokens=300"]
    pretend(monkeypatch, law_abiding, lr=lambda settings: 1e-3)
    assert main([str(tiny.recipe), *GRIDS, *CONSTANT, *power, "--results", str(tmp_path / "results.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "in 6 cells the highest rate applied is no fixed multiple of the one tuned" in said
    assert "no law of the best rates" in said


@pytest.mark.quick
def test_the_table_shows_each_cell_and_what_one_rate_costs(tiny, tmp_path, monkeypatch, capsys):
    losses = {("16", "1e-3"): 2.0, ("16", "2e-3"): 1.0, ("16", "4e-3"): 1.5, ("32", "1e-3"): 4.0, ("32", "2e-3"): 4.04}

    def loss(settings):
        return losses.get((settings["model.dim"], settings["lr_schedule.max_lr"]), 5.0)

    pretend(monkeypatch, loss)
    grids = ["--grid", "lr_schedule.max_lr=1e-3,2e-3,4e-3", "--grid", "model.dim=16,32", "--grid", "run.seed=0,1"]
    assert main([str(tiny.recipe), *grids, "--results", str(tmp_path / "results.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "| 16 | 2.000 | **1.000** | 1.500 | 0.002 | 0.00224 " in said
    assert "| 32 | **4.000** | 4.040 | 5.000 | 0.001 | below the grid |" in said
    assert "one lr_schedule.max_lr for all cells: 0.002, at the worst 1.00% above the best of a cell" in said
    assert "no law of the best rates: the law needs three cells or more" in said


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "model.dim=16,32"], "lr_schedule.max_lr or lr_schedule.a is not varied by a --grid"),
        (["--grid", "model.dim=16,32", "--rate", "optimizer.lr"], "optimizer.lr is not varied"),
        (["--grid", "lr_schedule.max_lrr=1,2"], "did you mean max_lr?"),
        (["--grid", "lr_schedule.max_lr=1,2", "--jobs", "0"], "--jobs 0: at least 1"),
        (["--grid", "lr_schedule.max_lr=1,2", "--resume"], "for the launcher"),
        (["--grid", "lr_schedule.decay=linear,cosine", "--rate", "lr_schedule.decay"], "linear is no number"),
        ([], "is not varied by a --grid"),
    ],
)
def test_mistakes_are_told_and_nothing_is_started(tiny, tmp_path, monkeypatch, capsys, arguments, said):
    launched = pretend(monkeypatch, lambda settings: 1.0)
    assert main([str(tiny.recipe), *arguments, "--results", str(tmp_path / "results.jsonl")]) == 2
    assert said in capsys.readouterr().err
    assert not launched


def test_runs_are_those_of_the_launcher_and_one_that_fails_is_told(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results, kept = tmp_path / "results.jsonl", tmp_path / "kept"
    command = [str(tiny.recipe), "--grid", "lr_schedule.max_lr=1e-2,1e9", "--training.max_grad_norm=none"]
    assert main([*command, "--results", str(results), "--runs", str(kept)]) == 0
    assert "max_lr = 1e9: failed after" in capsys.readouterr().out
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    good = next(row for row in rows if row["varied"]["lr_schedule.max_lr"] == "1e-2")
    assert tiny.launch("--training.max_grad_norm=none") == 0
    own = tiny.rows()
    assert good["outcome"]["val_loss"] == own[-1]["val_loss"]
    assert (good["outcome"]["steps"], good["outcome"]["tokens"]) == (own[-1]["step"], own[-1]["tokens"])
    assert (kept / good["digest"] / "metrics.jsonl").exists()


@pytest.mark.quick
def test_the_status_of_a_sweep_that_was_stopped_names_the_signal():
    assert stopped(KeyboardInterrupt()) == 130  # Ctrl-C, as Python raises it
    assert stopped(KeyboardInterrupt(signal.SIGTERM)) == 143


def test_a_signal_ends_the_runs_and_what_was_under_way_is_not_remembered(tiny, tmp_path):
    results, kept = tmp_path / "results.jsonl", tmp_path / "kept"
    command = ["--grid", "lr_schedule.max_lr=1e-3,2e-3", "--training.total_tokens=1B"]
    sweep = start_process(
        [sys.executable, "-m", "tools.sweep", tiny.recipe, *command, "--results", results, "--runs", kept],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_until(lambda: any(path.stat().st_size for path in Path(kept).glob("*/metrics.jsonl")), sweep)
    sweep.send_signal(signal.SIGTERM)
    _, said = sweep.communicate()
    assert sweep.returncode == 143, said
    assert "stopped; the same command goes on" in said and "Traceback" not in said
    assert not results.exists()
    (started,) = kept.iterdir()  # the second was not begun
    assert "stopped by signal" in (started / "log.txt").read_text()
