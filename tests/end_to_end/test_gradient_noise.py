"""The gradient noise that a run logs when its batch does not depend on it."""

from __future__ import annotations

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
