"""Squared norms: exact enough to subtract, in whatever order the elements lie."""

from __future__ import annotations

import pytest
import torch

from components.gradient_noise.norms import CHUNK, SquaredNorm, chunk_norms


def square(tensor: torch.Tensor) -> float:
    return float(chunk_norms(tensor).double().square().sum())


@pytest.mark.parametrize("shape", [(1,), (CHUNK - 1,), (CHUNK,), (3 * CHUNK + 7,), (300, 129), (2, 3, 5000), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_squares_add_up_to_the_whole(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert square(tensor) == pytest.approx(float(tensor.double().square().sum()), rel=1e-6)


def test_the_norm_of_two_million_elements_is_accurate():
    """torch's own norm of this tensor is off by 2e-4 on a CPU with wide registers."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(2_000_000, generator=generator) * torch.rand(2_000_000, generator=generator) ** 4
    assert square(tensor) == pytest.approx(float(tensor.double().square().sum()), rel=1e-6)


def test_strides_do_not_matter():
    tensor = torch.randn(700, 90)
    expected = float(tensor.double().square().sum())
    assert square(tensor.t()) == pytest.approx(expected, rel=1e-6)
    images = torch.randn(2, 30, 9, 8).to(memory_format=torch.channels_last)
    assert square(images) == pytest.approx(float(images.double().square().sum()), rel=1e-6)
    wide = torch.randn(700, 180)
    assert square(wide[:, ::2]) == pytest.approx(float(wide[:, ::2].double().square().sum()), rel=1e-6)


def test_a_squared_norm_may_be_flushed_at_any_time():
    tensors = [torch.randn(size) for size in (10, 5000, 3)]
    total = SquaredNorm(torch.device("cpu"))
    for tensor in tensors:
        total.add(tensor)
        total.flush()
    assert float(total.total()) == pytest.approx(sum(float(each.double().square().sum()) for each in tensors), rel=1e-6)
    assert total.total().dtype == torch.float64
