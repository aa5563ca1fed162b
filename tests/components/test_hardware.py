"""The speed of a processor, measured with a clock of the test."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest
import torch

from components.hardware import peak_flops

pytestmark = pytest.mark.quick


class SlowMatrix:
    """A matrix whose product takes 2 size^3 / rate seconds of `now`, and the first one a second more."""

    rate, now, products = 1.0, 0.0, 0
    sizes: ClassVar[set[int]] = set()

    def __init__(self, size: int, *_: int, dtype: torch.dtype) -> None:
        self.size = size

    def __matmul__(self, other: SlowMatrix) -> None:
        kind = type(self)
        kind.now += 2 * self.size**3 / self.rate + (not kind.products)
        kind.products += 1
        kind.sizes.add(self.size)


@pytest.mark.parametrize(("rate", "largest"), [(1e8, 128), (2e9, 256), (5e11, 1024)])
def test_the_first_product_does_not_count_and_only_those_that_the_time_allows_are_measured(monkeypatch, rate, largest):
    class Matrix(SlowMatrix):
        sizes: ClassVar[set[int]] = set()

    Matrix.rate = rate
    monkeypatch.setattr(torch, "ones", Matrix)
    monkeypatch.setattr(time, "thread_time", lambda: Matrix.now)
    threads = torch.get_num_threads()
    assert peak_flops.__wrapped__(torch.device("cpu"), torch.float32) == pytest.approx(rate * threads)
    assert torch.get_num_threads() == threads
    assert max(Matrix.sizes) == largest
    assert Matrix.now < 1.4, "the first one, and some tenths of a second"


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA RTX A1000", None), ("NVIDIA H100 PCIe", 756e12)]
)
def test_the_peak_of_a_gpu_is_that_of_its_whole_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops.__wrapped__(torch.device("cuda"), torch.bfloat16) == peak
