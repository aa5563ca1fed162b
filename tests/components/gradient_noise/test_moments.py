"""The estimates of one step."""

from __future__ import annotations

import math

import pytest
import torch

from components.gradient_noise.moments import GradientMoments


def moments(groups: torch.Tensor, samples: int) -> GradientMoments:
    """Of gradients (K, dimension), each the mean over `samples`."""
    mean = groups.mean(0)
    return GradientMoments(len(groups), samples, float(groups.square().sum()), float(mean.square().sum()))


def test_noise_and_signal_are_unbiased():
    """Gaussian samples with known Sigma and G: the means over many steps lie within three standard errors."""
    generator = torch.Generator().manual_seed(3)
    dimension, groups, samples, steps = 40, 6, 3, 4000
    scale = torch.linspace(0.1, 2.0, dimension, dtype=torch.float64)
    true = torch.linspace(-0.3, 0.3, dimension, dtype=torch.float64)
    draws = torch.randn(steps, groups, samples, dimension, generator=generator, dtype=torch.float64) * scale + true
    estimate = [moments(step, samples) for step in draws.mean(2)]
    for found, expected in (
        ([each.grad_cov_trace for each in estimate], float(scale.square().sum())),
        ([each.grad_sq_norm for each in estimate], float(true.square().sum())),
    ):
        values = torch.tensor(found, dtype=torch.float64)
        assert abs(float(values.mean()) - expected) < 3 * float(values.std()) / math.sqrt(steps)
        assert float(values.std()) / math.sqrt(steps) < 0.02 * expected, "too few draws to tell"


def test_groups_of_any_size_measure_the_noise_of_one_sample():
    generator = torch.Generator().manual_seed(5)
    each = torch.randn(512, 30, generator=generator, dtype=torch.float64) + 0.5
    for samples in (1, 2, 8):
        estimate = moments(each.view(-1, samples, 30).mean(1), samples)
        assert estimate.samples == 512
        assert estimate.grad_cov_trace == pytest.approx(30, rel=0.2)
        assert estimate.grad_sq_norm + estimate.grad_cov_trace / 512 == pytest.approx(
            float(each.mean(0).square().sum()), rel=1e-12
        )
