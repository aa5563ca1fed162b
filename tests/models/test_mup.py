"""muP: what each rule does to each parameter, and that without it nothing is left of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from components.distributed import fsdp, tensor_parallel
from components.lr_schedules import Power
from components.optimizers import AdamW
from components.train_step import TrainStep
from models.decoder import Decoder
from models.llama import Llama
from models.mup import MuP, MuPConfig, rule_of
from models.parallel_plan import llama_parallel_plan
from models.presets import PRESETS, LlamaShape
from models.rope import apply_rope
from tools.coord_check import fit_slope

pytestmark = pytest.mark.quick

MUP = MuP(base_width=16, embedding_multiplier=3.0, residual_multiplier=0.4)
PLAIN = LlamaShape(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=160)
WIDE = replace(PLAIN, mup=MUP)  # m_width = 4
V, B, T = 300, 3, 20
MATRICES = tuple(
    f"layers.{i}.{name}.weight"
    for i in (0, 1)
    for name in (
        *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo")),
        *(f"feed_forward.{w}" for w in ("w_gate", "w_up", "w_down")),
    )
)
OTHERS = ("tok_embeddings.weight", "output.weight", "norm.weight")
OTHERS += tuple(f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attention_norm", "ffn_norm"))


def decoder(size: LlamaShape, **options) -> Decoder:
    model = Decoder(size, V, **options)
    model.init_weights(0)
    return model


def batch() -> tuple[Tensor, Tensor]:
    drawn = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1], drawn[:, 1:]


def written_out(model: Decoder, tokens: Tensor, m: MuP | None) -> Tensor:
    """The logits of a Llama, or with the five changes of muP, line by line."""
    w, size = dict(model.named_parameters()), model.shape
    x, rope = w["tok_embeddings.weight"][tokens], model.rope.table(T, tokens.device)
    x = x if m is None else x * m.embedding_multiplier

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (size.dim,), w[f"{name}.weight"], size.norm_eps)

    for i in range(size.layers):
        at = f"layers.{i}.attention"
        h = norm(x, f"{at}_norm")
        q, k, v = (F.linear(h, w[f"{at}.{n}.weight"]).unflatten(-1, (-1, size.head_width)) for n in ("wq", "wk", "wv"))
        q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, rope), apply_rope(k, rope), v))
        scale = None if m is None else 1 / size.head_width
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)
        added = F.linear(out.transpose(1, 2).flatten(2), w[f"{at}.wo.weight"])
        x = x + (added if m is None else added * m.residual_multiplier)
        ff = f"layers.{i}.feed_forward"
        h = norm(x, f"layers.{i}.ffn_norm")
        hidden = F.silu(F.linear(h, w[f"{ff}.w_gate.weight"])) * F.linear(h, w[f"{ff}.w_up.weight"])
        added = F.linear(hidden, w[f"{ff}.w_down.weight"])
        x = x + (added if m is None else added * m.residual_multiplier)
    logits = F.linear(norm(x, "norm"), w["output.weight"])
    return logits if m is None else logits / (size.dim / m.base_width)


def gradients(model: Decoder, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_without_mup_it_is_the_plain_llama():
    off = Llama(mup=MuPConfig(enabled=False, base_width=16, embedding_multiplier=3.0)).resolved_shape
    assert off == PRESETS["debug"] and off.mup is None
    model = decoder(PLAIN, init_std=0.2)
    tokens, labels = batch()
    ours, plain = model(tokens), written_out(model, tokens, None)
    assert torch.equal(ours, plain)
    losses = [F.cross_entropy(logits.flatten(0, 1), labels.flatten()) for logits in (ours, plain)]
    for name, a, b in zip(dict(model.named_parameters()), *(gradients(model, loss) for loss in losses), strict=True):
        # the residual stream's gradients are summed in another order
        assert (a - b).norm() < 1e-6 * b.norm(), name


def test_the_multipliers_are_where_the_paper_has_them_in_logits_loss_and_gradients():
    model = decoder(WIDE, init_std=0.8)
    tokens, labels = batch()
    reference = written_out(model, tokens, MUP)
    assert reference.std() > 1, "else the tolerance says nothing"
    torch.testing.assert_close(model(tokens), reference, rtol=0, atol=2e-5)  # float32
    loss, expected = model(tokens, labels), F.cross_entropy(reference.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, a, b in zip(
        dict(model.named_parameters()), gradients(model, loss), gradients(model, expected), strict=True
    ):
        assert (a - b).norm() < 1e-5 * b.norm(), name


@pytest.mark.parametrize("depth_scaled", [False, True])
@pytest.mark.parametrize("base_width", [16, 64, 256])
def test_every_parameter_starts_with_the_std_it_should_have(base_width, depth_scaled):
    size = replace(WIDE, mup=replace(MUP, base_width=base_width))
    weights = dict(decoder(size, init_std=0.1, depth_scaled_init=depth_scaled).named_parameters())
    assert set(weights) == {*MATRICES, *OTHERS}
    for name, weight in weights.items():
        if "norm" in name:
            assert (weight == 1).all(), name
            continue
        expected = 0.1 / math.sqrt(64 / base_width) if name in MATRICES else 0.1
        if depth_scaled and name.split(".")[-2] in ("wo", "w_down"):
            expected /= math.sqrt(2 * 2)
        # five standard errors of the second moment of a normal
        ratio = float((weight.detach().double() / expected).square().mean())
        assert abs(ratio - 1) < 5 * math.sqrt(2 / weight.numel()), name


@pytest.mark.parametrize("base_width", [16, 64, 256])
def test_matrices_of_a_layer_learn_slower_by_their_width_and_all_else_does_not(base_width):
    model = decoder(replace(WIDE, mup=replace(MUP, base_width=base_width)))
    multipliers = {name: model.lr_multiplier(name) for name, _ in model.named_parameters()}
    assert multipliers == dict.fromkeys(MATRICES, base_width / 64) | dict.fromkeys(OTHERS, 1.0)


def test_a_tied_matrix_has_the_init_and_the_lr_of_both_its_uses():
    model = decoder(replace(WIDE, tied_embeddings=True), init_std=0.1)
    name = "tok_embeddings.weight"
    assert "output.weight" not in dict(model.named_parameters())
    assert (model.lr_multiplier(name), model.initial_std(name)) == (1.0, 0.1)
    untied = decoder(WIDE, init_std=0.1)
    for use in (name, "output.weight"):
        assert (untied.lr_multiplier(use), untied.initial_std(use)) == (1.0, 0.1)


def test_at_the_base_width_only_the_multipliers_are_left():
    at_base, plain = decoder(replace(WIDE, mup=replace(MUP, base_width=64))), decoder(PLAIN)
    assert {at_base.lr_multiplier(name) for name in plain.state_dict()} == {1.0}
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in at_base.state_dict().items())


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match=r"no rule for the parameter layers\.0\.router\.weight; add one"):
        rule_of("layers.0.router.weight")


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """A process group of four, of which this process is the only one."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_rules_find_their_parameters_under_tensor_parallelism_and_fsdp(tied, four_ranks):
    size = replace(WIDE, tied_embeddings=tied)
    with torch.device("meta"):
        alone, divided = Decoder(size, V), Decoder(size, V)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = llama_parallel_plan(size)
    tensor_parallel.apply_tensor_parallel(divided, plan.tensor_parallel, mesh["tp"])
    fsdp.apply_fsdp(divided, plan.fsdp_groups, mesh["dp"], torch.float32)
    assert all(isinstance(parameter, DTensor) for parameter in divided.parameters())
    for rule in ("lr_multiplier", "initial_std"):
        expected, found = (
            {name: getattr(model, rule)(name) for name, _ in model.named_parameters()} for model in (alone, divided)
        )
        assert found == expected


def groups(model: Decoder, optimizer: torch.optim.Optimizer, key: str) -> dict[str, float]:
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


def step_at(model: Decoder, lr: float, **keys) -> torch.optim.Optimizer:
    """The optimizer after one step at `lr`, of gradients that are all 1."""
    optimizer = AdamW(**keys).build(model=model)
    ranks = SimpleNamespace(size=1, device=torch.device("cpu"), sum=lambda tensor: tensor)
    unused = {"noise_hooks": None, "grad_sync": None, "max_grad_norm": None, "compute_context": nullcontext}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    TrainStep(model, optimizer, ranks, ranks, **unused).update(lr)
    return optimizer


@pytest.mark.parametrize(("tokens", "expected"), [(10**9, 0.02), (10**11, 0.0101)])
def test_groups_scale_the_capped_lr_of_the_power_law(tokens, expected):
    """At a batch of 1024 sequences of 4096: on the cap, and below it."""
    model = decoder(WIDE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lr = Power().lr(tokens, 1024 * 4096, 10**12)
    assert lr == pytest.approx(expected, rel=5e-3)  # published with three digits
    optimizer = step_at(model, lr, weight_decay=0.0)
    assert groups(model, optimizer, "lr") == dict.fromkeys(MATRICES, lr / 4) | dict.fromkeys(OTHERS, lr)
    for name, parameter in model.named_parameters():
        moved = (before[name] - parameter.detach()).mean()  # Adam's first step is the learning rate
        torch.testing.assert_close(moved.item(), lr / 4 if name in MATRICES else lr, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("follows", "expected"), [("schedule", 0.1), ("group", 0.1 / 4)])
def test_a_step_shrinks_every_matrix_alike_unless_decay_follows_the_group(follows, expected):
    decayed, plain = decoder(WIDE), decoder(WIDE)
    before = {name: parameter.detach().clone() for name, parameter in decayed.named_parameters()}
    step_at(decayed, 0.01, weight_decay=0.1, weight_decay_lr=follows)
    step_at(plain, 0.01, weight_decay=0.0)
    without = dict(plain.named_parameters())
    for name, parameter in decayed.named_parameters():
        share = (without[name] - parameter).detach().norm() / before[name].norm() / 0.01
        expect = 0.0 if "norm" in name else expected if name in MATRICES else 0.1
        assert float(share) == pytest.approx(expect, rel=1e-2), name


def test_all_gradients_shrink_with_width_alike_so_one_eps_serves_every_group():
    """And their norm, that of matrices, does not: one max_grad_norm serves every width."""
    widths = (32, 64, 128, 256)
    found = {}
    for width in widths:
        size = replace(WIDE, dim=width, heads=width // 16, kv_heads=width // 16, head_dim=16, ffn_dim=2 * width)
        model = decoder(size, init_std=0.1, depth_scaled_init=False)
        tokens, labels = batch()
        model(tokens, labels).backward()
        found[width] = {name: float(p.grad.square().mean().sqrt()) for name, p in model.named_parameters()}
    for name in found[32]:
        assert fit_slope(widths, [found[width][name] for width in widths]) == pytest.approx(-1, abs=0.25), name


def test_a_table_in_a_recipe_is_laid_over_that_of_the_size():
    assert Llama(size="powerlm3b").resolved_shape.mup == MuP(embedding_multiplier=12.0, residual_multiplier=0.22)
    over = Llama(size="powerlm3b", mup=MuPConfig(base_width=128)).resolved_shape.mup
    assert over == MuP(base_width=128, embedding_multiplier=12.0, residual_multiplier=0.22)
    assert Llama(size="powerlm3b", mup=MuPConfig(enabled=False)).resolved_shape.mup is None
    assert Llama(mup=MuPConfig()).resolved_shape.mup == MuP() == MuP(base_width=256)
    assert Llama(mup=MuPConfig(residual_multiplier=0.5)).resolved_shape.mup == MuP(residual_multiplier=0.5)


def test_it_costs_no_flops_and_no_parameters():
    wide, plain = decoder(WIDE), decoder(PLAIN)
    assert wide.flops_per_token(T) == plain.flops_per_token(T)
    assert {n: p.shape for n, p in wide.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


@pytest.mark.parametrize("base_width", [16, 64, 256])
def test_experts_are_matrices_of_a_layer_and_so_is_their_router(base_width):
    size = replace(WIDE, mup=replace(MUP, base_width=base_width), ffn_dim=32, experts=8, top_k=2)
    m_width = 64 / base_width
    model = decoder(size, init_std=0.1)
    inner = {f"layers.{i}.feed_forward.{name}.weight" for i in (0, 1) for name in ("router", "w_gate_up", "w_down")}
    weights = {name: weight for name, weight in model.named_parameters() if name in inner}
    assert weights.keys() == inner
    for name, weight in weights.items():
        assert model.lr_multiplier(name) == 1 / m_width
        expected = 0.1 / math.sqrt(m_width) / (math.sqrt(2 * 2) if "w_down" in name else 1)
        ratio = float((weight.detach().double() / expected).square().mean())
        assert abs(ratio - 1) < 5 * math.sqrt(2 / weight.numel()), name
