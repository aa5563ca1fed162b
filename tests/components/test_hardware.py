"""The speed of a processor, measured with a clock of the test."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from components.hardware import peak_flops

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("product_seconds", "size"), [(1.0, 128), (0.009, 256), (0.001, 1024)])
def test_only_products_that_the_time_allows_are_measured(monkeypatch, product_seconds, size):
    calls = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(calls) * product_seconds)
    measured = peak_flops.__wrapped__(torch.device("cpu"), torch.float32)
    assert measured == pytest.approx(2 * size**3 / product_seconds)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA RTX A1000", None), ("NVIDIA H100 PCIe", 756e12)]
)
def test_the_peak_of_a_gpu_is_that_of_its_whole_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops.__wrapped__(torch.device("cuda"), torch.bfloat16) == peak
