import copy

import pytest
import torch
from torch import nn

from components.optimizers import AdamW

pytestmark = pytest.mark.quick


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def decays(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize(
    ("rule", "expected"), [("matrices", (0.1, 0.1, 0.0, 0.0)), ("all", (0.1,) * 4), ("none", (0.0,) * 4)]
)
def test_decay_mask_by_rule(rule, expected):
    built = AdamW(decay=rule).build(parameters=model().named_parameters(), lr_multiplier=lambda name: 1.0)
    names = ("0.weight", "1.weight", "1.bias", "2.weight")
    assert tuple(decays(built)[name] for name in names) == expected


def test_groups_carry_the_multiplier_of_their_names():
    built = AdamW().build(
        parameters=model().named_parameters(), lr_multiplier=lambda name: 0.25 if name == "1.weight" else 1.0
    )
    multipliers = {name: g["lr_multiplier"] for g in built.param_groups for name in g["param_names"]}
    assert multipliers["1.weight"] == 0.25
    assert {multipliers[name] for name in multipliers if name != "1.weight"} == {1.0}


def test_update_is_the_formula_in_float64():
    """Three steps of decoupled AdamW, written out, on one matrix."""
    lr, betas, eps, decay = 1e-2, (0.9, 0.95), 1e-8, 0.1
    net = nn.Linear(4, 4, bias=False)
    optimizer = AdamW(betas=betas, eps=eps, weight_decay=decay).build(
        parameters=net.named_parameters(), lr_multiplier=lambda name: 1.0
    )
    weight = copy.deepcopy(net.weight.detach()).double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, 4):
        grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(t))
        net.weight.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        weight *= 1 - lr * decay
        first = betas[0] * first + (1 - betas[0]) * grad.double()
        second = betas[1] * second + (1 - betas[1]) * grad.double() ** 2
        weight -= lr * (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
    # float32 rounding of three steps on weights of order one
    torch.testing.assert_close(net.weight.detach().double(), weight, rtol=1e-6, atol=1e-7)
