"""Experts and their router against the same token by token; the router's losses against their formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.token_ids import IGNORE_INDEX
from models.decoder import Decoder
from models.moe import MoE, _mm_float32, routing_sums
from models.presets import LlamaShape
from models.router_loss import RouterLoss, RouterLossConfig

pytestmark = pytest.mark.quick

D, F_WIDTH, E, K = 16, 12, 6, 2
SIZE = LlamaShape(dim=D, layers=2, heads=2, kv_heads=1, ffn_dim=F_WIDTH, experts=E, top_k=K)
V, B, T = 61, 3, 10
KEYS = RouterLossConfig(load_balancing_coefficient=0.3, z_loss_coefficient=0.05)
OFF = RouterLossConfig(load_balancing_coefficient=0, z_loss_coefficient=0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts(ffn_dim: int = F_WIDTH) -> MoE:
    module = MoE(D, ffn_dim, E, K)
    for number, parameter in enumerate(module.parameters()):
        parameter.data = drawn(*parameter.shape, seed=number + 1) / 3
    return module


def token_by_token(module: MoE, x_BTD: Tensor) -> Tensor:
    """No sorting, no groups: each token goes through the experts of its largest logits."""
    out = []
    for x in x_BTD.flatten(0, 1):
        logits = module.router.weight @ x
        chosen = sorted(range(E), key=lambda e: -float(logits[e].detach()))[:K]
        shares = torch.stack([logits[e] for e in chosen]).exp()
        y = torch.zeros(D, dtype=x.dtype)
        for e, share in zip(chosen, shares / shares.sum(), strict=True):
            gate, up = (module.w_gate_up.weight[e] @ x).chunk(2)
            y = y + share * (module.w_down.weight[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view_as(x_BTD)


@pytest.mark.parametrize("ffn_dim", [F_WIDTH, 11], ids=["kernel", "loop"])
def test_they_are_what_they_are_token_by_token_in_value_and_every_gradient(ffn_dim):
    results = []
    for forward in (lambda module, x: module(x)[0], token_by_token):
        module, x = experts(ffn_dim), drawn(B, T, D).requires_grad_()
        y = forward(module, x)
        results.append((y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], drawn(B, T, D, seed=9))))
    for found, expected in zip(*results, strict=True):
        assert expected.norm() > 0.1, "else it says nothing"
        assert (found - expected).norm() < 1e-5 * expected.norm()  # float32


def test_bf16_rounds_what_experts_give_and_not_where_tokens_go():
    module, x = experts(16), drawn(B, T, D)
    exact, sums = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_sums = module(x)
    assert torch.equal(sums, rounded_sums)
    assert 0 < (rounded - exact).norm() < 1e-2 * exact.norm()


def test_no_token_is_dropped_however_uneven_and_none_depends_on_another():
    module = experts()
    module.router.weight.data.zero_()
    module.router.weight.data[:K, 0] = 5.0  # all that have a large first channel want the same two
    x = drawn(B, T, D)
    x[..., 0] = 3.0
    y, sums = module(x)
    assert sums[:E].tolist() == [B * T] * K + [0] * (E - K)
    torch.testing.assert_close(y, token_by_token(module, x), rtol=0, atol=1e-5)
    alone = torch.cat([module(x[:, t : t + 1])[0] for t in range(T)], 1)
    torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)  # products of other shapes


def test_experts_without_tokens_have_a_gradient_of_zero():
    module = experts()
    x = drawn(1, 1, D)
    module(x)[0].square().sum().backward()
    for parameter in (module.w_gate_up.weight, module.w_down.weight):
        idle = parameter.grad.flatten(1).norm(dim=1) == 0
        assert int(idle.sum()) == E - K


def test_routing_is_the_same_every_time():
    module, x = experts(), drawn(B, T, D)
    first, again = ([y.detach(), *torch.autograd.grad(y.sum(), list(module.parameters()))]
                    for y in (module(x)[0], module(x)[0]))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def losses_by_hand(logits: list[Tensor], keys: RouterLossConfig) -> Tensor:
    """Of one micro-batch, a layer at a time: means over tokens, then over layers, times the coefficients."""
    total = torch.zeros((), dtype=torch.float64)
    for of_layer in logits:
        p = of_layer.softmax(-1)
        sent = torch.zeros(E, dtype=torch.float64)
        for token in of_layer:
            sent[token.topk(K).indices] += 1 / (K * len(of_layer))
        total = total + keys.load_balancing_coefficient * E * (sent * p.mean(0)).sum()
        total = total + keys.z_loss_coefficient * of_layer.exp().sum(-1).log().square().mean()
    return total / len(logits)


def sums_of(logits: Tensor) -> Tensor:
    experts_S = logits.topk(K).indices.flatten().sort().values
    return routing_sums(logits, torch.searchsorted(experts_S, torch.arange(E), right=True, out_int32=True))


def test_the_losses_are_their_formulas_in_value_and_gradient():
    logits = [drawn(40, E, seed=seed).double().requires_grad_() for seed in (1, 2, 3)]
    found = RouterLoss(E, KEYS)([sums_of(each) for each in logits])
    expected = 40 * losses_by_hand(logits, KEYS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_even_loads_cost_one_and_a_collapsed_router_the_number_of_experts_over_those_chosen():
    even = torch.stack([torch.eye(E)[i] + torch.eye(E)[(i + 1) % E] for i in range(E)]) * 1e-6
    collapsed = torch.tensor([[50.0] * K + [0.0] * (E - K)]).expand(E, E)
    for logits, cost, most, least in ((even, 1.0, 1.0, 1.0), (collapsed, E / K, E / K, 0.0)):
        loss = RouterLoss(E, KEYS)
        loss([sums_of(logits)])
        numbers = loss.metrics_of(loss.pop_sums())
        assert numbers["load_balancing_loss"] == pytest.approx(cost, rel=1e-5)
        assert (numbers["expert_load_max"], numbers["expert_load_min"]) == pytest.approx((most, least), rel=1e-6)
        assert loss.pop_sums() is None, "taken"


def test_the_numbers_of_a_step_are_means_over_its_micro_batches():
    loss = RouterLoss(E, KEYS)
    layers = [[drawn(30, E, seed=seed + 10 * batch) for seed in (1, 2)] for batch in (0, 1, 2)]
    for micro_batch in layers:
        loss([sums_of(each) for each in micro_batch])
    numbers = loss.metrics_of(loss.pop_sums())
    only = [RouterLossConfig(load_balancing_coefficient=a, z_loss_coefficient=1 - a) for a in (1, 0)]
    for name, keys in zip(("load_balancing_loss", "router_z_loss"), only, strict=True):
        expected = sum(losses_by_hand([each.double() for each in m], keys) for m in layers) / 3
        assert numbers[name] == pytest.approx(float(expected), rel=1e-6)
    p = torch.cat([torch.cat(m) for m in layers]).double().softmax(-1)
    assert numbers["router_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-6)
    sent = torch.stack([sum(sums_of(m[layer])[:E] for m in layers) for layer in (0, 1)])
    assert numbers["expert_load_max"] == pytest.approx(float((sent / sent.mean(-1, keepdim=True)).max()))


def decoder(keys: RouterLossConfig) -> Decoder:
    model = Decoder(SIZE, V, init_std=0.25, router=keys)
    model.init_weights(0)
    return model


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def test_the_loss_is_that_of_the_tokens_and_its_gradient_also_that_of_the_router():
    ids, labels = tokens()
    labels = labels.clone()
    labels[0, :4] = IGNORE_INDEX  # sent to experts like any other token, and counted
    model, without = decoder(KEYS), decoder(OFF)
    loss, plain = model(ids, labels), without(ids, labels)
    assert torch.equal(loss, plain)
    logits: list[Tensor] = []
    for layer in without.layers.values():
        layer.feed_forward.register_forward_pre_hook(
            lambda module, inputs: logits.append(F.linear(inputs[0].flatten(0, 1), module.router.weight))
        )
    cross_entropy = F.cross_entropy(without(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    expected = cross_entropy + B * T * losses_by_hand(logits, KEYS).float()
    gradients = [torch.autograd.grad(of, list(m.parameters())) for of, m in ((loss, model), (expected, without))]
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm(), name


def test_validation_trains_no_router_and_notes_nothing():
    model = decoder(KEYS).eval()
    ids, labels = tokens()
    gradients = [torch.autograd.grad(m(ids, labels), list(m.parameters())) for m in (model, decoder(OFF))]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert model.pop_metric_sums() is None


def test_flops_are_those_of_the_experts_a_token_meets():
    model = decoder(OFF)
    ids, labels = tokens()
    product = torch.ops.powertrain

    def forward(x: tuple[int, ...], weight: tuple[int, ...], ends: object, out_shape: object = None) -> int:
        return 2 * x[0] * weight[1] * weight[2]

    def backward(
        d_y: object, x: tuple[int, ...], weight: tuple[int, ...], ends: object, out_shape: object = None
    ) -> int:
        return 2 * forward(x, weight, ends)

    counting = {product.grouped_mm: forward, product.grouped_mm_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=counting) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).backward()
    assert counter.get_total_flops() == model.flops_per_token(T) * B * T


def test_a_layer_of_experts_has_no_more_flops_than_the_experts_of_a_token():
    dense = Decoder(replace(SIZE, experts=0, top_k=0, ffn_dim=K * F_WIDTH), V)
    assert decoder(OFF).flops_per_token(T) == dense.flops_per_token(T) + 6 * SIZE.layers * D * E


def test_a_graph_of_the_router_on_a_gpu_holds_for_any_number_of_tokens():
    graph = make_fx(_mm_float32, tracing_mode="symbolic")(drawn(B * T, D), drawn(E, D)).graph
    (logits_NE,) = graph.output_node().all_input_nodes
    assert isinstance(logits_NE.meta["val"].shape[0], torch.SymInt)
