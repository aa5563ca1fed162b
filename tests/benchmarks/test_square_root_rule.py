"""The analysis of branches with larger batches."""

from __future__ import annotations

import pytest

from benchmarks.square_root_rule import BATCH, Measurement, rank_correlation, report


def row(step: int, scale: float | None, *losses: float | None) -> dict:
    branches = [{"k": 2**number, "val_loss": loss} for number, loss in enumerate(losses)]
    return {"seed": 0, "step": step, "lr": 1e-3, "noise_scale": scale, "noise_scale_adam": None, "branches": branches}


def test_the_critical_batch_is_where_the_gap_crosses_its_limit():
    found = Measurement.from_row(row(50, 32.0, 4.0, 4.01, 4.03, 4.2))
    assert found.gaps == pytest.approx({1: 0.0, 2: 0.01, 4: 0.03, 8: 0.2})
    assert found.critical_batch == pytest.approx(2**0.5 * 2 * BATCH), "half way between k = 2 and 4, in log k"
    assert Measurement.from_row(row(50, 32.0, 4.0, 3.9, 4.0, 4.01)).critical_batch is None, "larger than all branches"
    assert Measurement.from_row(row(50, 32.0, 4.0, 4.01, None, 4.2)).gaps.keys() == {1, 2, 8}, "a branch diverged"


def test_the_tables_have_every_point_and_bin():
    rows = [
        row(50, 10.0, 4.0, 4.05, 4.2, 4.5),
        row(100, 20.0, 4.0, 4.03, 4.1, 4.3),
        row(150, 40.0, 4.0, 4.01, 4.05, None),
    ]
    lines = list(report([Measurement.from_row(each) for each in rows]))
    assert "| 150 | 40 | - | 0.0100 | 0.0500 | - | 38 |" in lines
    assert "| 1 | 0.0100 (1) | - (0) |" in lines, "32 samples at a noise scale of 40"
    assert lines[-1].startswith("Euclidean: rank correlation with the critical batch 1.00 over 3 points")


def test_rank_correlation_depends_on_order_only():
    assert rank_correlation([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, -5]) == pytest.approx(-1)


def test_equal_values_share_their_mean_rank():
    # ranks 1.5, 1.5, 3 and 1, 2, 3: covariance 1.5, variances 1.5 and 2 (times n)
    assert rank_correlation([0, 0, 5], [1, 2, 3]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)
