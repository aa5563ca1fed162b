"""The estimators of noise scales, on gradients whose mean and covariance are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.noise_norms import BOUNDS, GROUPS, LABELS, NORMS, noise_and_norm, noise_scale, report

pytestmark = pytest.mark.quick
SAMPLES = 1024


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def bounds(name: str, truth: Tensor, noise: Callable[[], Tensor]) -> dict[str, float]:
    """Return the bounds for the gradient `truth`; `noise` draws the noise of one sample."""
    scale = math.sqrt(GROUPS / SAMPLES)
    groups = torch.stack([truth + scale * noise() for _ in range(GROUPS)])
    found = noise_and_norm([groups], SAMPLES, NORMS[name][0])
    return {bound: noise_scale([found], bound) for bound in BOUNDS} | {"growth": found["growth"]}


@pytest.mark.parametrize(
    ("name", "norm"),
    [("l2", Tensor.norm), ("l1", lambda x: x.abs().sum()), ("nuclear", lambda x: torch.linalg.svdvals(x).sum())],
)
def test_the_inner_product_with_the_direction_is_the_norm(name, norm):
    gradient = gaussian(5, 7)
    (direction,) = NORMS[name][0]([gradient])
    assert float((direction * gradient).sum()) == pytest.approx(float(norm(gradient)))
    dual = {"l2": direction.norm(), "l1": direction.abs().max(), "nuclear": torch.linalg.svdvals(direction).max()}
    assert float(dual[name]) == pytest.approx(1)


def test_the_euclidean_noise_scale_is_unbiased():
    truth, deviation = gaussian(20_000), torch.linspace(1, 15, 20_000, dtype=torch.float64)
    found = bounds("l2", truth, lambda: deviation * gaussian(20_000))
    expected = float(deviation.norm() / truth.norm()) ** 2  # tr(Sigma) / |G|^2, about 75
    assert found["low"] == pytest.approx(expected, rel=0.05)
    assert expected < found["high"] < 1.15 * expected
    assert found["growth"] == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 0.97, 1.2), (0.1, 0.6, 1.05)])
def test_the_bounds_of_l1_contain_the_noise_scale(share, low, high):
    truth = gaussian(20_000) * (torch.rand(20_000, dtype=torch.float64) < share)
    deviation = 10 * share * torch.exp(0.5 * gaussian(20_000))
    found = bounds("l1", truth, lambda: deviation * gaussian(20_000))
    error = math.sqrt(2 / math.pi) * float(deviation.sum())  # E|x| of a normal x is sqrt(2 / pi) of its deviation
    expected = (error / float(truth.abs().sum())) ** 2
    assert low * expected < found["low"] < 1.03 * expected
    assert 0.97 * expected < found["high"] < high * expected


@pytest.mark.parametrize(("power", "low", "high"), [(0.5, 0.97, 1.1), (1.0, 0.9, 1.4)])
def test_the_bounds_of_the_nuclear_norm_contain_the_noise_scale(power, low, high):
    rows, columns = 96, 192
    left, _ = torch.linalg.qr(gaussian(rows, rows))
    right, _ = torch.linalg.qr(gaussian(columns, rows))
    singular = torch.arange(1, rows + 1, dtype=torch.float64) ** -power
    truth = left * singular @ right.T
    deviation = 7 * float(truth.norm()) / math.sqrt(truth.numel())  # a Euclidean noise scale of 49
    found = bounds("nuclear", truth, lambda: deviation * gaussian(rows, columns))
    error = sum(float(torch.linalg.svdvals(deviation * gaussian(rows, columns)).sum()) for _ in range(8)) / 8
    expected = (error / float(singular.sum())) ** 2
    assert low * expected < found["low"] < 1.03 * expected
    assert 0.97 * expected < found["high"] < high * expected


def test_noise_that_does_not_average_out_as_the_square_root_is_seen():
    """Rare large noise: |x| of a group is smaller, relative to its deviation, than that of all samples."""

    def rare() -> Tensor:
        return gaussian(20_000) * (torch.rand(20_000) < 0.05) / math.sqrt(0.05)

    assert bounds("l1", gaussian(20_000), rare)["growth"] < 0.6


def test_a_gradient_that_is_only_noise_has_no_upper_bound():
    assert bounds("l2", torch.zeros(20_000), lambda: gaussian(20_000))["high"] > 20 * SAMPLES


def test_the_tables_have_every_norm_averaged_over_the_branch():
    def branches(step: int) -> list[dict[str, float]]:  # a critical batch of 45, a little larger at the later step
        gaps = ((1, 0.0), (2, 0.01), (4, 0.03 - step * 1e-7), (8, 0.2))
        return [{"k": k, "val_loss": 4 + gap} for k, gap in gaps]

    key = {"seed": 0, "lr": 1e-3}
    measured = [
        key | {"step": step, "noise_scale": float(step), "noise_scale_adam": 60.0 + step, "branches": branches(step)}
        for step in (50, 150)
    ]
    rows = [
        key
        | {"step": step}
        | {name: {"noise": noise**0.5, "norm_low": 1.0, "norm_high": 2**0.5, "growth": 1.0} for name in NORMS}
        for step, noise in ((50, 9.0), (100, 27.0), (150, 36.0))
    ]
    lines = list(report(rows, measured))
    assert f"| 50 | 50 | 110 |{' 9 to 18 |' * len(NORMS)} 45 |" in lines
    (line,) = (line for line in lines if line.startswith(f"| {LABELS['l1']}, high"))
    assert "| 1.89 ± 0.89 | 47% |" in line, "45 / 18 and 45 / 36"
