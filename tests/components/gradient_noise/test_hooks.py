"""The hooks measure the same as the gradients of each micro-batch, computed separately."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components.gradient_noise import GradientMoments, GradientNoiseHooks
from components.gradient_noise.norms import SquaredNorm
from models.decoder import Decoder
from models.presets import LlamaShape
from tests.models.variants import combined_shapes

SHAPES = combined_shapes(LlamaShape(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24))


def finish(hooks: GradientNoiseHooks, model: nn.Module) -> tuple[float, float]:
    l2, micro = hooks.sums(list(model.parameters())).tolist()  # no others: the norm of Adam is not measured
    return l2, micro


def test_the_hooks_square_every_backward_separately():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    model[0].bias.requires_grad_(False)
    hooks = GradientNoiseHooks(model.parameters(), torch.device("cpu"))
    inputs = torch.randn(3, 4, 5)
    for _ in range(2):  # a step starts from zero
        model.zero_grad()
        hooks.start(measure=True)
        for micro_batch in inputs:
            (model(micro_batch).square().mean() / len(inputs)).backward()
            hooks.end_micro_batch()
    estimate = GradientMoments.from_sums(*finish(hooks, model), num_micro_batches=3, micro_batch_size=4)

    alone = []
    for micro_batch in inputs.double():
        copy = copy_in_float64(model)
        loss = copy(micro_batch).square().mean()
        gradients = torch.autograd.grad(loss, [each for each in copy.parameters() if each.requires_grad])
        alone.append(torch.cat([each.flatten() for each in gradients]))
    groups = torch.stack(alone)
    assert (estimate.num_micro_batches, estimate.micro_batch_size) == (3, 4)
    assert estimate.sum_micro_grad_sq_norms == pytest.approx(float(groups.square().sum()), rel=1e-5)
    assert estimate.mean_grad_sq_norm == pytest.approx(float(groups.mean(0).square().sum()), rel=1e-5)


def copy_in_float64(model: nn.Module) -> nn.Module:
    copy = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    copy.load_state_dict(model.state_dict())
    copy[0].bias.requires_grad_(False)
    return copy


def test_a_step_that_is_not_measured_has_a_norm_and_no_moments():
    model = nn.Linear(3, 1)
    hooks = GradientNoiseHooks(model.parameters(), torch.device("cpu"))
    hooks.start(measure=False)
    model(torch.ones(2, 3)).sum().backward()
    hooks.end_micro_batch()
    assert finish(hooks, model) == (pytest.approx(16.0), 0.0)  # 2 for each of three weights and the bias


def test_the_norm_of_a_step_launches_nothing_of_autograd(monkeypatch):
    with_gradients: list[bool] = []
    monkeypatch.setattr(SquaredNorm, "add", lambda self, tensor: with_gradients.append(torch.is_grad_enabled()))
    model = nn.Linear(3, 1)
    model(torch.ones(2, 3)).sum().backward()
    GradientNoiseHooks(model.parameters(), torch.device("cpu")).sums(list(model.parameters()))
    assert with_gradients == [False, False]


@pytest.mark.parametrize("replaced", [["weight"], ["weight", "bias"]])
def test_gradients_that_bypass_the_hooks_are_an_error(replaced):
    model = nn.Linear(3, 1)
    hooks = GradientNoiseHooks(model.parameters(), torch.device("cpu"))
    for name in replaced:
        setattr(model, name, nn.Parameter(getattr(model, name).detach()))
    hooks.start(measure=True)
    model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=f"{len(replaced)} of 2 gradients .* replaces its parameters"):
        finish(hooks, model)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_noise_of_a_decoder_with_variants_is_that_of_separate_backwards_in_float64(shape):
    """Every pair of variants occurs in a shape. Layouts: tests/distributed/test_gradient_noise.py."""
    model, exact = (Decoder(shape, 19, init_std=0.2) for _ in range(2))
    for each in (model, exact):
        each.init_weights(0)
    exact.double()
    hooks = GradientNoiseHooks(model.parameters(), torch.device("cpu"))
    hooks.start(measure=True)
    gradients = []
    for micro_batch in torch.randint(19, (3, 2, 13), generator=torch.Generator().manual_seed(1)):
        tokens, labels = micro_batch[:, :-1], micro_batch[:, 1:]
        (model(tokens, labels) / labels.numel()).backward()
        hooks.end_micro_batch()
        loss = F.cross_entropy(exact(tokens).flatten(0, 1), labels.flatten())
        alone = torch.autograd.grad(loss, list(exact.parameters()))
        gradients.append(torch.cat([each.flatten() for each in alone]))
    expected = torch.stack(gradients)
    found = finish(hooks, model)
    assert found == pytest.approx((float(expected.sum(0).square().sum()), float(expected.square().sum())), rel=1e-5)
