"""The product of every group at once is that of each by itself: value, and gradients of both factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.grouped_linear import GroupedLinear, grouped_mm, kernel_supports, loop_over_groups

pytestmark = pytest.mark.quick

ENDS = {
    "uneven": [5, 6, 19, 30],
    "some without rows": [0, 12, 12, 30],
    "the last without rows": [7, 9, 30, 30],
    "one for all": [0, 30, 30, 30],
}
ends = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
WORST = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
"""Relative, of norms: sums in another order; and 8 bits of each result."""


def factors(dtype: torch.dtype, device: str, inner: int = 16, outer: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """x (30, inner), weight (4, outer, inner), and a gradient of the product."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((30, inner), (4, outer, inner), (30, outer))
    x, weight, d_y = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), d_y


def by_hand(x: Tensor, weight: Tensor, d_y: Tensor, ends: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw in float64, row by row."""
    x, weight, d_y = (tensor.detach().double().cpu() for tensor in (x, weight, d_y))
    group = torch.searchsorted(torch.tensor(ends), torch.arange(len(x)), right=True)
    y = torch.einsum("soi,si->so", weight[group], x)
    d_x = torch.einsum("soi,so->si", weight[group], d_y)
    d_weight = torch.zeros_like(weight)
    for row, g in enumerate(group.tolist()):
        d_weight[g] += torch.outer(d_y[row], x[row])
    return y, d_x, d_weight


def close(found: Tensor, expected: Tensor, limit: float) -> bool:
    return bool((found.double().cpu() - expected).norm() <= limit * expected.norm())


@devices
@pytest.mark.parametrize("dtype", WORST, ids=str)
@ends
def test_kernel_and_loop_are_the_product_by_hand(ends, dtype, device):
    for inner, outer, kernel in ((16, 24, True), (15, 23, False)):
        x, weight, d_y = factors(dtype, device, inner, outer)
        offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        assert kernel_supports(x, weight) == kernel
        y = grouped_mm(x, weight, offsets)
        y.backward(d_y)
        for what, found, expected in zip(
            ("y", "dx", "dw"), (y.detach(), x.grad, weight.grad), by_hand(x, weight, d_y, ends), strict=True
        ):
            assert found.dtype == dtype and close(found, expected, WORST[dtype]), (what, kernel)
        assert torch.equal(weight.grad[torch.tensor(ends).diff(prepend=torch.tensor([0])) == 0].count_nonzero().cpu(),
                           torch.tensor(0)), "a group without rows has a gradient, and it is zero"  # fmt: skip


@devices
@pytest.mark.parametrize("dtype", WORST, ids=str)
@ends
def test_the_loop_gives_what_the_kernel_gives(ends, dtype, device):
    """Through autograd's own backward of the loop: nothing of ours is on that side."""
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    results = []
    for product in (grouped_mm, loop_over_groups):
        x, weight, d_y = factors(dtype, device)
        y = product(x, weight, offsets)
        results.append((y.detach(), *torch.autograd.grad(y, (x, weight), d_y)))
    for found, expected in zip(*results, strict=True):
        assert close(found, expected.double().cpu(), WORST[dtype])


def test_the_gradient_is_that_of_finite_differences():
    x, weight, _ = factors(torch.float64, "cpu", 3, 5)
    offsets = torch.tensor(ENDS["some without rows"], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, weight: grouped_mm(x, weight, offsets), (x, weight))


@pytest.mark.slow
def test_torch_finds_nothing_wrong_with_the_operation():
    """Schema, fake tensors, and what compiling needs."""
    x, weight, _ = factors(torch.float32, "cpu")
    torch.library.opcheck(grouped_mm, (x, weight, torch.tensor(ENDS["uneven"], dtype=torch.int32)))


def test_a_gradient_that_is_one_number_spread_out_is_taken():
    x, weight, _ = factors(torch.float32, "cpu")
    grouped_mm(x, weight, torch.tensor(ENDS["uneven"], dtype=torch.int32)).sum().backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


def test_under_autocast_products_are_in_its_precision_and_gradients_in_that_of_the_weight():
    layer = GroupedLinear(4, 16, 24)
    torch.nn.init.normal_(layer.weight)
    x, _, _ = factors(torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, torch.tensor(ENDS["uneven"], dtype=torch.int32))
    y.float().square().sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
