"""Compute, traffic and launching of a step. Bytes are held against a real run in tests/distributed/test_collectives."""

from __future__ import annotations

import pytest

from components.hardware import device_spec
from recipes.config import ConfigError
from recipes.dry_run.plan import HardwareTarget, RunPlan, make_plan
from recipes.dry_run.report import report_lines
from recipes.dry_run.step_time import INFINIBAND, Collective, StepTime, estimate_step_time
from tests.recipes.dry_run.plans import config_of

pytestmark = pytest.mark.quick

H100 = device_spec("H100")


def step(tiny, processes: int, local: int, *arguments: str) -> tuple[RunPlan, StepTime]:
    """A step of four micro-batches, in bf16 on H100s."""
    config = config_of(tiny, "--run.device=auto", "--training.precision=bf16", *arguments)
    plan = make_plan(config, processes, HardwareTarget(), local)
    found = estimate_step_time(plan, H100, 4)
    assert found is not None
    return plan, found


def test_bytes_over_a_link_are_those_of_the_busiest_rank():
    """8 GB gathered over 8: 7/8 come from elsewhere. Over two nodes half must enter each, through four adapters."""
    nvlink = Collective(8e9, 8, 1).seconds(8, 1e9 / 0.73)
    assert nvlink == pytest.approx((7.0, 0.0))
    inside, between = Collective(8e9, 8, 1).seconds(4, 1e9 / 0.73)
    assert (inside, between) == pytest.approx((7.0, 4e9 / 4 / INFINIBAND))
    replicas = Collective(1e9, 2, 8, rounds=2).seconds(8, 1e9)  # one rank of each node: an adapter of its own
    assert replicas == pytest.approx((0.0, 2 * 0.5e9 / INFINIBAND))
    assert Collective(8e9, 8, 1).seconds(1, 1e9) == pytest.approx((0.0, 7e9 / INFINIBAND))


def test_a_node_alone_uses_no_infiniband_and_replicas_use_it_once_a_step(tiny):
    _, alone = step(tiny, 8, 8)
    plan, several = step(tiny, 64, 8)
    assert alone.infiniband == 0
    assert plan.mesh_shape.dp_replicate == 8
    parameters = sum(parameter.numel() for parameter in plan.model.parameters())
    assert several.infiniband == pytest.approx(
        2 * 7 / 8 * 4 * parameters / 8 / INFINIBAND, rel=0.05
    )  # 257 rows are padded
    assert several.nvlink == alone.nvlink


def test_reducing_after_every_micro_batch_multiplies_the_traffic_and_the_launching(tiny):
    plan, local = step(tiny, 8, 8, "--training.grad_sync=once_per_step")
    _, reduced = step(tiny, 8, 8, "--training.grad_sync=every_micro_batch")
    # 2 + 4 bytes a parameter once, or 2 + 4 of all and 2 of the blocks four times
    total = sum(parameter.numel() for parameter in plan.model.parameters())
    blocks = sum(parameter.numel() for parameter in plan.model.layers.parameters())
    assert reduced.nvlink / local.nvlink == pytest.approx(4 * (6 * total + 2 * blocks) / (6 * total), rel=0.05)
    assert reduced.launch > local.launch
    assert reduced.compute == local.compute


def test_recomputing_costs_a_third_more_products_and_compiling_launches_less(tiny):
    eager = "--training.compile=false"
    _, plain = step(tiny, 1, 1, eager)
    _, full = step(tiny, 1, 1, eager, "--training.activation_checkpoint=full")
    _, selective = step(tiny, 1, 1, eager, "--training.activation_checkpoint=selective")
    _, compiled = step(tiny, 1, 1, "--training.activation_checkpoint=selective")
    assert full.compute == pytest.approx(plain.compute * 4 / 3)
    assert selective.compute == plain.compute
    assert compiled.launch < plain.launch < full.launch < selective.launch
    assert plain.nvlink == plain.infiniband == 0


@pytest.mark.parametrize(
    ("parts", "bound"),
    [
        ((4.0, 1, 2, 3), "compute"),
        ((1.0, 4, 2, 3), "NVLink"),
        ((1.0, 2, 4, 3), "InfiniBand"),
        ((1.0, 2, 3, 4), "launching"),
    ],
)
def test_the_longest_bounds_the_step(parts, bound):
    assert StepTime(*parts).bound == bound


def test_a_step_on_the_cpu_has_no_such_bounds(tiny, capsys):
    assert tiny.launch("--dry-run=cpu") == 0
    assert "bound by" not in capsys.readouterr().out
    assert tiny.launch("--dry-run=H100") == 0
    assert "bound by" in capsys.readouterr().out


MUON = "--optimizer.use=components.optimizers:Muon"


def test_the_norm_of_adam_gathers_its_factors_in_measured_steps(tiny):
    plan, plain = step(tiny, 8, 8)
    norms, third = '--gradient_noise.norms=["l2", "adam"]', "--gradient_noise.interval_steps=3"
    parameters = sum(parameter.numel() for parameter in plan.model.parameters())
    for keys, interval in (([norms], 1), ([norms, third], 3)):
        _, found = step(tiny, 8, 8, *keys)
        more = 2 * parameters / interval * 7 / 8 / (H100.link_bytes * 0.73)
        assert found.nvlink - plain.nvlink == pytest.approx(more, rel=1e-3)


def test_muon_adds_its_products_and_its_exchange_to_a_step(tiny):
    """The tiny model, dim 16 and ffn_dim 32, two blocks: q and o are 16 x 16, k and v 8 x 16, three of 32 x 16."""
    plan, plain = step(tiny, 8, 8)
    with_muon, found = step(tiny, 8, 8, MUON)
    products = [(16, 16), (16, 16), (8, 16), (8, 16), (16, 32), (16, 32), (16, 32)]
    flops = 2 * sum(5 * (4 * m * m * n + 2 * m**3) for m, n in products)
    elements = 2 * sum(m * n for m, n in products)
    assert with_muon.update_cost == (flops, elements)
    assert found.compute - plain.compute == pytest.approx(flops / 8 / (H100.flops * 0.65), rel=1e-3)
    link = H100.link_bytes * 0.73
    assert found.nvlink - plain.nvlink == pytest.approx(2 * elements * 2 / 8 * 7 / 8 / link, rel=1e-3)
    lines = "\n".join(report_lines(with_muon))
    assert f"update         {flops:.4g} FLOPs per step over all processes; each receives 0.0 MB" in lines
    assert "update  " not in "\n".join(report_lines(plan))


def test_updates_of_muon_enter_a_node_once_for_each_of_its_ranks():
    exchange = Collective(8e9, 8, 1, distinct=True)
    assert exchange.seconds(4, 1e9 / 0.73) == pytest.approx((7.0, 4e9 / INFINIBAND))


def test_a_pattern_of_muon_that_matches_nothing_is_a_problem_of_the_plan(tiny):
    with pytest.raises(ConfigError, match=r"optimizer.muon_on.*\n.*'blocks\.\*' matches no parameter"):
        step(tiny, 8, 8, MUON, '--optimizer.muon_on=["blocks.*"]')
