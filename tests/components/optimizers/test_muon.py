from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from components.optimizers import AdamW, Muon
from components.optimizers.muon_step import update_scale
from models.llama import Llama
from tests.components.optimizers.muon_reference import MuonReference

pytestmark = pytest.mark.quick

LR = 0.02


class Net(nn.Module):
    """Two matrices and a stack of matrices in a block, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        block = nn.ModuleDict({"wide": nn.Linear(6, 10), "tall": nn.Linear(10, 6, bias=False)})
        block.register_parameter("stack", nn.Parameter(torch.randn(3, 4, 6)))
        self.layers = nn.ModuleDict({"0": block})

    def lr_multiplier(self, name: str) -> float:
        return 1.0


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, lr: float = LR) -> None:
    """Take a step with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
    optimizer.step()


def on_muon(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if "momentum_buffer" in optimizer.state[parameter]}


@pytest.mark.parametrize("variant", ["muon", "normuon"])
@pytest.mark.parametrize("lr_scale", ["match_rms_adamw", "spectral"])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_updates_equal_the_formula_in_float64(variant, lr_scale, coefficients):
    net = Net()
    optimizer = Muon(coefficients=coefficients, variant=variant, lr_scale=lr_scale).build(model=net)
    names = on_muon(optimizer, net)
    assert names == {"layers.0.wide.weight", "layers.0.tall.weight", "layers.0.stack"}
    keys = {"normuon": variant == "normuon", "coefficients": coefficients}
    references = {name: MuonReference(net.get_parameter(name).detach(), **keys) for name in names}
    for seed in range(4):
        step(net, optimizer, seed)
        for name, reference in references.items():
            reference.step(net.get_parameter(name).grad, LR, 0.1, lr_scale=lr_scale)
    for name, reference in references.items():
        # four steps of float32 on weights of order one
        torch.testing.assert_close(net.get_parameter(name).detach().double(), reference.weight, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("lr_scale", "of_torch"), [("spectral", "original"), ("match_rms_adamw", "match_rms_adamw")])
def test_it_equals_muon_of_torch_bitwise(lr_scale, of_torch):
    """torch computes in bf16."""
    net = Net()
    theirs = copy.deepcopy(net.layers["0"]["wide"].weight)
    expected = torch.optim.Muon([theirs], weight_decay=0.1, adjust_lr_fn=of_torch, lr=LR)
    optimizer = Muon(coefficients="quintic", lr_scale=lr_scale, compute_dtype="bf16").build(model=net)
    for seed in range(3):
        step(net, optimizer, seed)
        theirs.grad = net.layers["0"]["wide"].weight.grad.clone()
        expected.step()
        assert torch.equal(theirs, net.layers["0"]["wide"].weight)


def test_other_parameters_equal_adamw_bitwise():
    nets = [Net(), Net()]
    optimizers = [each(weight_decay=0.3).build(model=net) for each, net in zip((Muon, AdamW), nets, strict=True)]
    for seed in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            step(net, optimizer, seed)
    for name in ("embedding.weight", "layers.0.wide.bias"):
        assert torch.equal(*(net.get_parameter(name) for net in nets)), name


def test_match_rms_adamw_gives_an_update_the_rms_of_adamw():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    step(net, Muon(weight_decay=0.0).build(model=net), 0)
    update = (net.state_dict()["layers.0.wide.weight"] - before["layers.0.wide.weight"]) / LR
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.1)  # 0.2: Moonlight's mean of AdamW
    assert update_scale("spectral", 12, 3) == 2 and update_scale("spectral", 3, 12) == 1


def test_merged_matrices_and_heads_are_orthogonalized_one_by_one():
    shape = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_dim": 4, "experts": 2, "top_k": 1}
    model = Llama(**shape).build(vocab_size=8, sequence_length=8)
    model.init_weights(0)
    before = copy.deepcopy(model.state_dict())
    step(model, Muon(weight_decay=0.0, lr_scale="spectral", per_head=True).build(model=model), 0)
    for name, parts in {"feed_forward.w_gate_up": 2, "attention.wq": 2, "attention.wk": 1}.items():
        name = f"layers.0.{name}.weight"
        update = (before[name] - model.state_dict()[name]) / LR
        for matrix in update.unflatten(-2, (parts, -1)).flatten(0, -3):
            values = torch.linalg.svdvals(matrix)
            assert values.min() > 0.6 and values.max() < 1.2, name
    assert model.merged_matrices("layers.0.attention.wq.weight", per_head=False) == 1


def test_the_router_norms_and_embeddings_are_left_to_adamw():
    shape = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_dim": 4, "experts": 2, "top_k": 1}
    model = Llama(**shape).build(vocab_size=8, sequence_length=8)
    names = on_muon(Muon().build(model=model), model)
    assert names == {f"layers.0.attention.w{each}.weight" for each in "qkvo"} | {
        f"layers.0.feed_forward.{each}.weight" for each in ("w_gate_up", "w_down")
    }


def test_patterns_choose_the_optimizer_of_a_parameter():
    net = Net()
    chosen = Muon(muon_on=("layers.*", "embedding.weight"), adamw_on=("*.tall.weight", "*.stack")).build(model=net)
    assert on_muon(chosen, net) == {"embedding.weight", "layers.0.wide.weight"}


def test_the_state_of_every_parameter_exists_before_the_first_step():
    for model in (Net(), Llama(dim=16, layers=1, heads=2, head_dim=8).build(vocab_size=8, sequence_length=8)):
        optimizer = Muon(variant="normuon").build(model=model)
        created = {
            parameter: {key: (value.shape, value.dtype) for key, value in optimizer.state[parameter].items()}
            for parameter in model.parameters()
        }
        step(model, optimizer, 0)
        for parameter, keys in created.items():
            assert keys
            assert keys == {key: (value.shape, value.dtype) for key, value in optimizer.state[parameter].items()}


def test_decay_factors_follow_the_batch():
    net = Net()
    optimizer = Muon(
        variant="normuon", normuon_beta2=0.9, reference_batch_tokens=100, momentum_half_life_tokens=400
    ).build(model=net)
    optimizer.set_batch_tokens(200)
    assert optimizer.momentum == pytest.approx(0.5**0.5) and optimizer.normuon_beta2 == pytest.approx(0.81)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95**2)}
    fixed = Muon(momentum=0.9).build(model=net)
    fixed.set_batch_tokens(200)
    assert (fixed.momentum, fixed.normuon_beta2) == (0.9, 0.95)


@pytest.mark.parametrize("variant", ["muon", "normuon"])
def test_a_step_that_the_device_skips_changes_nothing(variant):
    """`found_inf`, as the train step sets it on a GPU; torch's fused AdamW reads it too."""
    net = Net()
    optimizer = Muon(variant=variant).build(model=net)
    step(net, optimizer, 0)
    kept = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.ones(())
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    for before, now in zip(kept, (net.state_dict(), optimizer.state_dict()["state"]), strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0)
    optimizer.found_inf = torch.zeros(())
    expected = copy.deepcopy(net)
    plain = Muon(variant=variant).build(model=expected)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(net, optimizer, 1)
    step(expected, plain, 1)
    for name, parameter in expected.named_parameters():
        # lerp and multiply-add round differently
        torch.testing.assert_close(net.get_parameter(name), parameter, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("variant", ["muon", "normuon"])
def test_a_matrix_without_a_gradient_is_skipped_as_torch_does(variant):
    net = Net()
    optimizer = Muon(variant=variant).build(model=net)
    step(net, optimizer, 0)
    unused = net.layers["0"]["wide"].weight
    kept = copy.deepcopy((unused, optimizer.state[unused]))
    other = net.layers["0"].stack.detach().clone()
    for parameter in net.parameters():
        parameter.grad = None if parameter is unused else torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close((unused, optimizer.state[unused]), kept, rtol=0, atol=0)
    assert not torch.equal(net.layers["0"].stack, other)


class Scaled(Net):
    def lr_multiplier(self, name: str) -> float:
        return 0.5 if "wide" in name else 1.0


class FourDimensions(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers["0"].register_parameter("convolution", nn.Parameter(torch.zeros(2, 2, 2, 2)))


class ThreeParts(Net):
    def muon_lr_multiplier(self, name: str, lr_scale: str, *, per_head: bool) -> float:
        return 1.0

    def merged_matrices(self, name: str, *, per_head: bool) -> int:
        return 3


@pytest.mark.parametrize(
    ("model", "keys", "key", "message"),
    [
        (Net, {"muon_on": ("blocks.*",)}, "muon_on", "'blocks.*' matches no parameter; they are embedding.weight"),
        (Net, {"adamw_on": ("*.stakc",)}, "adamw_on", "'.*stakc' matches no parameter"),
        (Net, {"muon_on": ("*.bias",)}, "muon_on", "leaves no matrix for Muon; use components.optimizers:AdamW"),
        (FourDimensions, {}, "muon_on", "layers.0.convolution has 4 dimensions"),
        (Scaled, {}, "muon_on", "is 0.5, which holds for AdamW only; give the model muon_lr_multiplier"),
        (ThreeParts, {}, "", "layers.0.stack has 4 rows, which are not 3 matrices of equal size"),
    ],
)
def test_a_model_that_does_not_fit_gets_one_clear_message(model, keys, key, message):
    with pytest.raises(ValueError, match=message) as error:
        Muon(**keys).build(model=model())
    assert getattr(error.value, "key", "") == key


def test_a_frozen_matrix_is_left_to_adamw_and_stays():
    net = Net()
    net.layers["0"]["wide"].weight.requires_grad_(False)
    optimizer = Muon().build(model=net)
    assert "layers.0.wide.weight" not in on_muon(optimizer, net)
