"""models/recompute.py: fewer saved tensors, and the results and gradients of plain autograd, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.moe import GATED
from models.norm import rms_norm
from models.recompute import recompute

pytestmark = pytest.mark.quick


def plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, 1e-5)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...]]] = {
    "norm": (plain_norm, lambda x, gain: rms_norm(x, gain, 1e-5), (16,)),
    **{
        name: (gate, lambda x, up, gate=gate: recompute(gate, x, up), (4, 16))  # type: ignore[misc]
        for name, gate in GATED.items()
    },
}


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((4, 16), shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_same_results_and_gradients_from_the_inputs_alone(name, dtype):
    plain, recomputed, shape = CASES[name]
    outcomes = []
    for function in (plain, recomputed):
        inputs, saved = inputs_of(shape, dtype), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            output = function(*inputs)
        gradients = torch.autograd.grad(output, inputs, torch.linspace(-1, 1, 64).view(4, 16).to(dtype))
        new = {x.untyped_storage()._cdata for x in saved} - {x.untyped_storage()._cdata for x in inputs}
        outcomes.append((output, *gradients, len(new)))
    (*expected, kept_by_plain), (*actual, kept) = outcomes
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert kept == 0 < kept_by_plain


def test_an_input_without_gradient_gets_none():
    x, up = inputs_of((4, 16), torch.float32)
    recompute(GATED["silu"], x, up.detach()).sum().backward()
    assert x.grad is not None
    assert up.grad is None


def test_without_gradients_it_is_a_plain_call():
    x, up = inputs_of((4, 16), torch.float32)
    with torch.no_grad():
        assert not recompute(GATED["silu"], x, up).requires_grad
