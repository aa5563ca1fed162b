import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from components.checkpoint import StateTensors
from components.optimizers import AdamW, Muon
from components.optimizers.stochastic_rounding import round_at_random
from components.train_step import TrainStep

pytestmark = pytest.mark.quick


def model(multiplier: Callable[[str], float] = lambda name: 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    net.lr_multiplier = multiplier
    return net


def linear() -> nn.Linear:
    torch.manual_seed(0)
    net = nn.Linear(4, 4, bias=False)
    net.lr_multiplier = lambda name: 1.0
    return net


def decays(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize(
    ("rule", "expected"), [("matrices", (0.1, 0.1, 0.0, 0.0)), ("all", (0.1,) * 4), ("none", (0.0,) * 4)]
)
def test_decay_mask_by_rule(rule, expected):
    built = AdamW(weight_decay_on=rule).build(model=model())
    names = ("0.weight", "1.weight", "1.bias", "2.weight")
    assert tuple(decays(built)[name] for name in names) == expected


def test_groups_carry_the_multiplier_of_their_names():
    built = AdamW().build(model=model(lambda name: 0.25 if name == "1.weight" else 1.0))
    multipliers = {name: g["lr_multiplier"] for g in built.param_groups for name in g["param_names"]}
    assert multipliers["1.weight"] == 0.25
    assert {multipliers[name] for name in multipliers if name != "1.weight"} == {1.0}


@pytest.mark.parametrize("follows", ["schedule", "group"])
def test_a_multiplier_of_zero_freezes_a_parameter(follows):
    net = model(lambda name: float(name != "1.weight"))
    optimizer = AdamW(weight_decay_on="all", weight_decay_lr=follows).build(model=net)
    assert {name for name, decay in decays(optimizer).items() if decay} == {"0.weight", "1.bias", "2.weight", "2.bias"}
    before = copy.deepcopy(net.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_multiplier"]
    net(torch.arange(10)).square().sum().backward()
    optimizer.step()
    assert {name for name, tensor in net.state_dict().items() if torch.equal(tensor, before[name])} == {"1.weight"}


@pytest.mark.parametrize("multiplier", [-1.0, math.nan])
def test_a_multiplier_that_is_none_is_refused(multiplier):
    with pytest.raises(ValueError, match=r"lr_multiplier\(.0\.weight.\) is (-1\.0|nan)"):
        AdamW().build(model=model(lambda name: multiplier))


def test_update_is_the_formula_in_float64():
    """Three steps of decoupled AdamW, written out, on one matrix."""
    lr, betas, eps, decay = 1e-2, (0.9, 0.95), 1e-8, 0.1
    net = linear()
    optimizer = AdamW(betas=betas, eps=eps, weight_decay=decay).build(model=net)
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


REFERENCE = 100
"""Tokens of the batch that the betas are meant for."""


def training(**keys) -> tuple[nn.Module, TrainStep]:
    net = linear()
    optimizer = AdamW(**keys).build(model=net)
    ranks = SimpleNamespace(size=1, device=torch.device("cpu"), sum=lambda tensor: tensor)
    unused = {"noise_hooks": None, "grad_sync": None, "max_grad_norm": None, "compute_context": nullcontext}
    return net, TrainStep(net, optimizer, ranks, ranks, **unused)


def update(net: nn.Module, step: TrainStep, gradient: torch.Tensor, tokens: int) -> torch.Tensor:
    """One step; returns the second moment after it."""
    net.weight.grad = gradient.clone()
    step.optimizer.set_batch_tokens(tokens)  # as TrainStep.accumulate does
    step.update(0.01)
    return step.optimizer.state[net.weight]["exp_avg_sq"].double().clone()


def betas(step: TrainStep) -> tuple[float, float]:
    return step.optimizer.param_groups[0]["betas"]


@pytest.mark.parametrize("batch", [25, 50, 100, 200, 800])
def test_the_second_moment_forgets_per_token_whatever_the_batch(batch):
    """One gradient, then zeros: what is left of its square after 1600 tokens is 0.95^16 of what came in."""
    net, step = training(betas=(0.9, 0.95), reference_batch_tokens=REFERENCE)
    first = update(net, step, torch.ones(4, 4), batch)
    for _ in range(1600 // batch):
        last = update(net, step, torch.zeros(4, 4), batch)
    torch.testing.assert_close(last / first, torch.full((4, 4), 0.95**16, dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_fixed_stream_cut_into_other_batches_has_the_same_average():
    """Squares that are equal within 200 tokens, cut into batches of 100 and of 200: the same second moment at the end
    of each 200, which one beta for both does not give."""
    squares = torch.rand(12, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    stream = [(root, 2) for root in squares.sqrt()]

    def run(tokens: int, **keys) -> list[torch.Tensor]:
        net, step = training(betas=(0.9, 0.95), **keys)
        found = []
        for gradient, hundreds in stream:
            for _ in range(hundreds * REFERENCE // tokens):
                last = update(net, step, gradient, tokens)
            found.append(last)
        return found

    by_tokens = {"reference_batch_tokens": REFERENCE}
    for one, two in zip(run(100, **by_tokens), run(200, **by_tokens), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
    difference = (run(100)[-1] / run(200)[-1]).min()
    assert difference > 1.3, "a test that can fail"


def test_the_update_reads_the_beta_of_its_own_step():
    """Fused AdamW at two batches in turn, against the formula in float64."""
    net, step = training(betas=(0.9, 0.95), weight_decay=0.0, reference_batch_tokens=REFERENCE)
    assert step.optimizer.param_groups[0]["fused"] is True
    weight = net.weight.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, tokens in enumerate((100, 300, 50), 1):
        gradient = torch.randn(4, 4, generator=torch.Generator().manual_seed(t))
        update(net, step, gradient, tokens)
        beta2 = 0.95 ** (tokens / 100)
        assert betas(step) == (0.9, pytest.approx(beta2, rel=1e-15))
        first = 0.9 * first + 0.1 * gradient.double()
        second = beta2 * second + (1 - beta2) * gradient.double() ** 2
        weight -= 0.01 * (first / (1 - 0.9**t)) / ((second / (1 - beta2**t)).sqrt() + 1e-8)
    torch.testing.assert_close(net.weight.detach().double(), weight, rtol=1e-6, atol=1e-7)


def test_without_a_reference_the_betas_stay_at_every_batch():
    net, step = training(betas=(0.9, 0.95))
    for tokens in (100, 800):
        update(net, step, torch.ones(4, 4), tokens)
        assert betas(step) == (0.9, 0.95)


def test_at_its_reference_nothing_changes_at_all():
    nets = []
    for keys in ({}, {"reference_batch_tokens": REFERENCE}):
        net, step = training(**keys)
        for seed in range(5):
            update(net, step, torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)), REFERENCE)
        nets.append(net)
    assert torch.equal(nets[0].weight, nets[1].weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("before", [None, REFERENCE])
@pytest.mark.parametrize("after", [None, REFERENCE])
def test_a_checkpoint_brings_its_moments_and_no_betas(tmp_path, before, after):
    """Whether it was on before and is on now: the recipe's betas, never one that was meant for a single step."""
    world = SimpleNamespace(rank=0, size=1, is_main=True, barrier=lambda: None)
    net, step = training(betas=(0.9, 0.95), reference_batch_tokens=before)
    moment = update(net, step, torch.ones(4, 4), 800)
    dcp.save(StateTensors(net, step.optimizer, world).collect(), checkpoint_id=tmp_path, no_dist=True)

    resumed, resumed_step = training(betas=(0.9, 0.95), reference_batch_tokens=after, weight_decay=0.3)
    StateTensors(resumed, resumed_step.optimizer, world).restore(tmp_path)
    assert betas(resumed_step) == (0.9, 0.95)
    assert resumed_step.optimizer.param_groups[0]["weight_decay"] == 0.3, "what the recipe says now"
    loaded = resumed_step.optimizer.state[resumed.weight]["exp_avg_sq"].double()
    assert torch.equal(loaded, moment)
    update(resumed, resumed_step, torch.ones(4, 4), 200)
    assert betas(resumed_step)[1] == pytest.approx(0.95**2 if after else 0.95)


def test_rounding_at_random_keeps_the_expectation():
    x = torch.tensor([1.0, 1.001, -1.001, 3e-39, -7.7e8, 0.0])
    drawn = torch.stack([round_at_random(x, torch.tensor(float(step)), 5) for step in range(4000)])
    below, above = drawn.amin(0).float(), drawn.amax(0).float()
    assert torch.all((below <= x) & (x <= above)), "one of the two neighbours in bf16"
    gap = above - below
    standard_error = gap / 2 / 4000**0.5
    assert torch.all((drawn.double().mean(0) - x).abs() <= 4 * standard_error)
    assert torch.equal(gap == 0, torch.tensor([True, False, False, False, False, True])), "exact values stay"
    exceptions = torch.tensor([math.inf, -math.inf, math.nan])
    assert torch.equal(round_at_random(exceptions, torch.ones(()), 5)[:2].float(), exceptions[:2])
    assert round_at_random(exceptions, torch.ones(()), 5)[2].isnan()


def test_elements_steps_and_keys_are_rounded_independently():
    """Of values in the middle between two in bf16 half are rounded up, and of these again half under another key."""
    x = torch.full((2**16,), 1 + 2**-8)
    up = [round_at_random(x, torch.tensor(float(step)), key) > 1 for step, key in ((1, 5), (2, 5), (1, 6))]
    for a, b in ((up[0], up[1]), (up[0], up[2]), (up[0], up[0].roll(1)), (up[0], up[0].roll(256))):
        assert float(a.double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 256)
        assert float((a & b).double().mean()) == pytest.approx(0.25, abs=4 * 0.43 / 256)  # 4 standard errors


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_a_first_moment_in_bf16_trains_as_one_in_float32_within_rounding(optimizer):
    nets, kept = [], []
    for dtype in ("float32", "bf16"):
        net = model()
        net.layers = nn.ModuleDict({"0": nn.Linear(4, 4)})
        built = optimizer(state_dtype=dtype).build(model=net)
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for group in built.param_groups:
                group["lr"] = 0.01
            built.step()
        nets.append(net)
        kept.append(built.state[net[0].weight])
    assert kept[1]["exp_avg"].dtype == torch.bfloat16 and kept[1]["exp_avg_sq"].dtype == torch.float32
    assert torch.equal(kept[0]["exp_avg_sq"], kept[1]["exp_avg_sq"])
    # one rounding is 2^-8 of the moment, of which a step keeps 0.9: about 2^-8 / sqrt(1 - 0.9^2) in all
    torch.testing.assert_close(kept[1]["exp_avg"].float(), kept[0]["exp_avg"], rtol=0.05, atol=0.01)
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=20 * 0.01 * 0.02)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("saved", ["float32", "bf16"])
def test_a_checkpoint_restores_a_first_moment_in_the_dtype_of_the_recipe(tmp_path, saved):
    world = SimpleNamespace(rank=0, size=1, is_main=True, barrier=lambda: None)
    net, step = training(state_dtype=saved)
    update(net, step, torch.rand(4, 4), 100)
    dcp.save(StateTensors(net, step.optimizer, world).collect(), checkpoint_id=tmp_path, no_dist=True)
    resumed, resumed_step = training(state_dtype="bf16")
    StateTensors(resumed, resumed_step.optimizer, world).restore(tmp_path)
    restored, before = (each.optimizer.state[part.weight] for each, part in ((resumed_step, resumed), (step, net)))
    assert restored["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(restored["exp_avg"], before["exp_avg"].to(torch.bfloat16))
    assert torch.equal(restored["exp_avg_sq"], before["exp_avg_sq"])
    gradient = torch.rand(4, 4)
    for part, trained in ((net, step), (resumed, resumed_step)):
        update(part, trained, gradient, 100)
    both = [one.optimizer.state[part.weight]["exp_avg"] for one, part in ((step, net), (resumed_step, resumed))]
    assert torch.equal(*both) == (saved == "bf16"), "bitwise, whatever else drew random numbers"
