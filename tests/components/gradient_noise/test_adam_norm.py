"""The noise in the norm of Adam equals sums in float64. Layouts: tests/distributed/test_gradient_noise.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from components.gradient_noise import AdamNorm, GradientMoments, GradientNoiseHooks, require_preconditioner
from components.optimizers import AdamW, Muon
from models.llama import Llama

pytestmark = pytest.mark.quick


class World:
    rank, size, device = 0, 1, torch.device("cpu")

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor


class Given:
    """A preconditioner with given second moments."""

    def __init__(self, moments: dict[Tensor, Tensor], multiplier: float = 1.0, eps: float = 0.0) -> None:
        self.moments, self.factors = moments, (multiplier, eps)

    def second_moments(self):
        return ((parameter, moment, *self.factors) for parameter, moment in self.moments.items())


def hooks_of(model: nn.Module, optimizer) -> GradientNoiseHooks:
    parameters = dict(model.named_parameters())
    adam = AdamNorm(require_preconditioner(optimizer), parameters, parameters, World())
    return GradientNoiseHooks(parameters.values(), World.device, adam=adam)


def measure(model: nn.Module, hooks: GradientNoiseHooks, losses, samples: int) -> GradientMoments:
    """Return the moments in the norm of Adam of a step of micro-batches with these losses."""
    model.zero_grad()
    hooks.start(measure=True)
    for loss in losses:
        (loss() / len(losses)).backward()
        hooks.end_micro_batch()
    _, _, *in_adam = hooks.sums(list(model.parameters())).tolist()
    total, micro = in_adam or (0.0, 0.0)
    return GradientMoments.from_sums(total, micro, num_micro_batches=len(losses), micro_batch_size=samples)


def test_the_moments_equal_those_of_separate_backwards_in_float64():
    model = Llama(size="debug", dim=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffn_dim=32).build(
        vocab_size=19, sequence_length=8
    )
    model.init_weights(0)
    settings = AdamW(betas=(0.9, 0.8), eps=1e-4)
    optimizer = settings.build(model=model)
    hooks = hooks_of(model, optimizer)
    torch.manual_seed(0)
    tokens = torch.randint(0, 19, (5, 4, 2, 9))  # steps, micro-batches, samples, ids
    gradients = []
    for step, micro_batches in enumerate(tokens):
        losses = [lambda batch=batch: model(batch[:, :-1], batch[:, 1:]) for batch in micro_batches]
        found = measure(model, hooks, losses, samples=2)
        each = [torch.autograd.grad(loss(), list(model.parameters())) for loss in losses]
        per_batch = [torch.cat([g.double().flatten() for g in grads]) for grads in each]
        if step == 0:
            assert (found.sum_micro_grad_sq_norms, found.mean_grad_sq_norm) == (0, 0), "there is no second moment yet"
        else:
            factors = []
            for index, parameter in enumerate(model.parameters()):
                decayed = sum(0.2 * 0.8**age * g[index] ** 2 for age, g in enumerate(reversed(gradients)))
                moment = decayed / (1 - 0.8 ** len(gradients))
                root = moment.clamp(min=0.01 * float(moment.mean())).sqrt() + 1e-4
                multiplier = model.lr_multiplier(list(dict(model.named_parameters()))[index])
                factors.append((multiplier / root).sqrt().to(torch.bfloat16).double().flatten())
                assert parameter.numel() == factors[-1].numel()
            scaled = torch.stack(per_batch) * torch.cat(factors)
            assert found.sum_micro_grad_sq_norms == pytest.approx(float(scaled.square().sum()), rel=1e-3)
            assert found.mean_grad_sq_norm == pytest.approx(float(scaled.mean(0).square().sum()), rel=1e-3)
        gradients.append([parameter.grad.double().clone() for parameter in model.parameters()])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()


def test_the_estimates_of_a_problem_with_known_noise():
    """The gradient of sample x of the loss w x is x: its mean and covariance are known."""
    torch.manual_seed(0)
    mean, deviation = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 1.0, 2.0])
    moment = torch.tensor([16.0, 1.0, 4.0])
    model = nn.Linear(3, 1, bias=False)
    hooks = hooks_of(model, Given({model.weight: moment.view(1, 3)}, multiplier=4.0))
    traces, squares = [], []
    for _ in range(1500):
        samples = mean + deviation * torch.randn(4, 2, 3)
        found = measure(model, hooks, [lambda x=x: model(x).mean() for x in samples], samples=2)
        traces.append(found.grad_cov_trace)
        squares.append(found.grad_sq_norm)
    weights = 4 / moment.sqrt()  # powers of two, exact in bf16 after the root
    for values, exact in ((traces, (weights * deviation**2).sum()), (squares, (weights * mean**2).sum())):
        found = torch.tensor(values)
        error = float(found.std()) / math.sqrt(len(found))
        assert float(found.mean()) == pytest.approx(float(exact), abs=4 * error)
        assert error < 0.03 * float(exact)


def test_a_rare_row_does_not_outweigh_the_others_and_an_unused_parameter_has_no_part():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("common", "unused", "new")})
    common, unused, new = (module.weight for module in model.values())
    moments = {common: torch.tensor([[1.0, 1.0], [1.0, 1e-12]]), unused: torch.zeros(2, 2)}
    adam = AdamNorm(Given(moments), dict(model.named_parameters()), dict(model.named_parameters()), World())
    assert adam.prepare()
    scaled = adam.scale(0, torch.ones(2, 2)).square()
    assert scaled.flatten().tolist() == pytest.approx([1, 1, 1, 1 / math.sqrt(0.01 * 0.75)], rel=1e-2)
    for index, parameter in ((1, unused), (2, new)):  # the optimizer has no state of the last one
        assert not adam.scale(index, torch.ones(2, 2)).any()
        assert not adam.scale_sharded(parameter, torch.ones(2, 2)).any()


def test_an_optimizer_without_second_moments_is_refused():
    model = Llama(size="debug", dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn_dim=32).build(
        vocab_size=19, sequence_length=8
    )
    for optimizer in (Muon().build(model=model), torch.optim.SGD(model.parameters())):
        with pytest.raises(ValueError, match=r"use components\.optimizers:AdamW"):
            require_preconditioner(optimizer)
