"""The gradient noise that a run logs when its batch does not depend on it."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEYS = ("noise_scale", "noise_scale_over_batch", "grad_cov_trace", "grad_sq_norm", "grad_cov_trace_ema")
CONSTANT = ["--batch.use=components.batch:Constant", "--batch.initial_size=8", "--checkpoint.interval_steps=none"]


def steps(tiny) -> list[dict]:
    return [row for row in tiny.rows() if "loss" in row]


def test_a_constant_batch_logs_the_noise_scale(tiny):
    assert tiny.launch(*CONSTANT) == 0
    for row in steps(tiny):
        b = row["global_batch_size"]
        assert row["grad_sq_norm"] == pytest.approx(row["grad_norm"] ** 2 - row["grad_cov_trace"] / b, rel=1e-9)
        assert row["noise_scale"] == pytest.approx(row["grad_cov_trace_ema"] / row["grad_sq_norm_ema"], rel=1e-9)
        assert row["noise_scale_over_batch"] == pytest.approx(row["noise_scale"] / b, rel=1e-9)


def test_measuring_less_often_or_never_changes_nothing_else(tiny):
    rows_of = {}
    for interval in ("1", "3", "none"):
        settings = [f"--gradient_noise.interval_steps={interval}", "--run.if_exists=replace"]
        assert tiny.launch(*CONSTANT, *settings) == 0
        rows_of[interval] = steps(tiny)
    for always, sometimes, never in zip(*rows_of.values(), strict=True):
        assert always["loss"] == sometimes["loss"] == never["loss"]
        assert always["grad_norm"] == sometimes["grad_norm"] == never["grad_norm"]
        assert all(always[key] is not None for key in KEYS)
        assert all(never[key] is None for key in KEYS)
        measured = (sometimes["step"] - 1) % 3 == 0
        assert all((sometimes[key] is not None) == measured for key in KEYS)
        if measured:
            assert sometimes["grad_cov_trace"] == always["grad_cov_trace"]


def test_a_single_micro_batch_warns_once_that_noise_is_not_measured(tiny):
    assert tiny.launch(*CONSTANT, "--training.micro_batch_size=8") == 0
    assert all(row["noise_scale"] is None for row in steps(tiny))
    log = (tiny.directory / "log.txt").read_text()
    assert log.count("gradient noise is not measured") == 1
    assert "lower training.micro_batch_size" in log


def test_a_batch_that_could_never_adapt_is_refused(tiny, capsys):
    adaptive = ["--batch.use=components.batch:NormTest", "--batch.initial_size=8", "--batch.max_size=64"]
    assert tiny.launch(*adaptive, "--batch.eta=1", "--training.micro_batch_size=8") == 2
    assert "batch" in (said := capsys.readouterr().err)
    assert "use 16 or lower training.micro_batch_size" in said


ADAM = ["--batch.use=components.batch:NoiseScale", "--batch.initial_size=8", "--batch.max_size=64", "--batch.norm=adam"]
NORMS = '--gradient_noise.norms=["l2", "adam"]'


def test_a_batch_that_follows_the_noise_in_the_norm_of_adam_is_exact_on_resume(new_tiny):
    whole, cut = new_tiny("whole"), new_tiny("cut")
    slow = ["--batch.coefficient=20", "--batch.max_growth=1.5", "--checkpoint.interval_steps=1"]
    slow += ["--optimizer.reference_batch_tokens=4000"]
    for tiny in (whole, cut):
        assert tiny.launch(*ADAM, NORMS, *slow) == 0
    assert cut.launch(f"--resume={cut.checkpoint(3)}", f"--run.dir={cut.folder / 'resumed'}", *ADAM, NORMS, *slow) == 0
    resumed = [json.loads(line) for line in (cut.folder / "resumed" / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row for row in resumed if "loss" in row and row["step"] > 3}
    rows = steps(whole)
    assert "noise_scale_adam" not in rows[0], "Adam has no second moment before its first step"
    for row, after in pairwise(rows[1:]):
        for suffix in ("_adam", ""):
            ratio = row[f"grad_cov_trace_ema{suffix}"] / row[f"grad_sq_norm_ema{suffix}"]
            assert row[f"noise_scale{suffix}"] == pytest.approx(ratio, rel=1e-9)
        assert row["noise_scale_adam"] != row["noise_scale"]
        wanted = min(math.ceil(20 * row["noise_scale_adam"]), int(row["requested_batch_size"] * 1.5), 64)
        assert after["requested_batch_size"] == max(wanted, row["requested_batch_size"])
        if row["step"] > 3:
            same = {key: row[key] for key in row if "second" not in key and "memory" not in key and key != "mfu"}
            assert {key: found[row["step"]][key] for key in same} == same
    assert rows[-1]["requested_batch_size"] > 8


def test_a_norm_that_is_not_measured_is_refused(tiny, capsys):
    assert tiny.launch(*ADAM) == 2
    assert "batch.norm" in (said := capsys.readouterr().err)
    assert '"adam" is not measured; add it to gradient_noise.norms' in said
    assert tiny.launch(*CONSTANT, '--gradient_noise.norms=["adam"]') == 2
    assert 'expected ["l2"] or ["l2", "adam"]' in capsys.readouterr().err
    for dry_run in ([], ["--dry-run"]):
        assert tiny.launch(*CONSTANT, NORMS, "--optimizer.use=components.optimizers:Muon", *dry_run) == 2
        said = "".join(capsys.readouterr())
        assert "gradient_noise.norms" in said
        assert "MuonOptimizer has none; use components.optimizers:AdamW" in said
