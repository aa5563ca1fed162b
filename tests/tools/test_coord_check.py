"""The coordinate check passes muP, and fails the standard parametrization and muP without any one rule."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from models import mup
from models.mup import MuP, Rule
from tools.coord_check import Check, CheckConfig, fit_slope, main, run_check

pytestmark = pytest.mark.quick

SMALL = CheckConfig(widths=(16, 32, 64, 128), head_dim=8, base_width=16, steps=3)
TOLERANCE = 0.15
QK = (".attention.wq", ".attention.wk")
INNER = {f"layers.{i}{part}" for i in (0, 1) for part in ("", ".attention", ".feed_forward", *QK)}


@pytest.mark.parametrize("model", [[], ["experts=6", "top_k=2"]], ids=["dense", "experts"])
def test_mup_passes(model):
    assert run_check(replace(SMALL, model=model), "mup").failures(TOLERANCE) == []


@pytest.mark.slow
@pytest.mark.parametrize("lr_scale", ["match_rms_adamw", "spectral"])
@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
def test_mup_passes_under_muon(optimizer, lr_scale):
    assert run_check(replace(SMALL, optimizer=optimizer, lr_scale=lr_scale), "mup").failures(TOLERANCE) == []


@pytest.mark.parametrize(
    "variants",
    [
        ["qk_norm=per_head", "norm_placement=both", "zero_centered_norm=true", "activation=gelu_tanh"],
        ["qk_norm=all_heads", "norm_placement=post", "qkv_bias=true", "gated_attention=true"],
        ["sliding_window=8", "attention_softcap=20.0", "logit_softcap=10.0", "partial_rotary_factor=0.5"],
    ],
)
def test_mup_passes_with_variants(variants):
    assert run_check(replace(SMALL, model=variants), "mup").failures(TOLERANCE) == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_completep_passes_over_depths_and_mup_alone_fails(optimizer):
    depths = replace(SMALL, depths=(2, 4, 8, 16), optimizer=optimizer)
    assert run_check(depths, "completep").failures(TOLERANCE) == []
    assert run_check(depths, "mup").failures(2 * TOLERANCE) == ["last block"]


def test_muon_without_its_rule_fails(monkeypatch):
    muon = replace(SMALL, optimizer="muon", lr=0.05)
    monkeypatch.setattr(MuP, "muon_lr_factor", lambda self, name, dim, lr_scale, by_head: 1.0)
    assert "layers.0.feed_forward" in run_check(muon, "mup").failures(2 * TOLERANCE)


@pytest.mark.parametrize("lr_scale", ["match_rms_adamw", "spectral"])
def test_heads_of_queries_and_keys_have_a_rule_of_their_own_under_muon(monkeypatch, lr_scale):
    """At a learning rate that moves them, on 16 tokens: more than a width would fill the directions of small models."""
    keys = {"optimizer": "muon", "lr_scale": lr_scale, "lr": 0.2, "per_head": True, "sequence_length": 4}
    heads = replace(SMALL, widths=(32, 64, 128, 256), base_width=32, **keys)
    names = ("layers.0.attention.wq", "layers.0.attention.wk")
    found = run_check(heads, "mup").worst_slope
    assert all(abs(found[name]) < 0.1 for name in names)
    factor = MuP.muon_lr_factor
    monkeypatch.setattr(MuP, "muon_lr_factor", lambda *arguments, by_head: factor(*arguments, by_head=False))
    without = run_check(heads, "mup").worst_slope
    assert all(without[name] > 0.25 for name in names)


def test_the_standard_parametrization_fails_in_all_that_depends_on_width():
    found = run_check(SMALL, "standard")
    assert set(found.failures(TOLERANCE)) == {*INNER, "output"}
    assert all(found.worst_slope[name] > (0.45 if name.endswith(("wq", "wk")) else 1) for name in INNER)


@pytest.mark.parametrize(
    ("without", "caught"), [({"lr": 0}, "layers.0.feed_forward"), ({"init_std": 0}, "layers.0.attention")]
)
def test_mup_without_one_rule_of_the_table_fails(without, caught, monkeypatch):
    for pattern, rule in mup.RULES.items():
        monkeypatch.setitem(mup.RULES, pattern, rule._replace(**without))
    assert caught in run_check(SMALL, "mup").failures(TOLERANCE)


@pytest.mark.slow
def test_a_head_that_learns_slower_in_a_wider_model_fails_to_keep_up(monkeypatch):
    """Neither the division of logits nor the full learning rate of the head may be left out or applied twice."""
    with monkeypatch.context() as patch:
        patch.setattr(MuP, "width_multiple", lambda self, dim: 1.0)
        assert "output" in run_check(SMALL, "mup").failures(TOLERANCE)
    patient = CheckConfig(widths=SMALL.widths, head_dim=8, base_width=16, steps=20)
    right = run_check(patient, "mup").slopes["output"][-1]
    monkeypatch.setitem(mup.RULES, "output.weight", Rule(init_std=0, lr=-1))
    assert run_check(patient, "mup").slopes["output"][-1] < right - 0.1


def test_the_slope_is_the_exponent():
    assert fit_slope([8, 16, 64], [3 * width**0.7 for width in (8, 16, 64)]) == pytest.approx(0.7)
    assert math.isnan(fit_slope([8, 16], [1.0, math.inf]))
    assert math.isnan(fit_slope([8, 16], [1.0, 0.0]))


def test_a_size_that_is_not_finite_is_a_failure():
    blown_up = Check("mup", {8: {"layers.0": [1.0, 1.0]}, 16: {"layers.0": [1.0, math.inf]}})
    assert blown_up.failures(1e9) == ["layers.0"]


ARGUMENTS = ["--widths", "16", "32", "64", "--head-dim", "8", "--base-width", "16", "--steps", "2", "--seeds", "3"]


def test_the_exit_status_is_the_verdict(capsys):
    assert main([*ARGUMENTS, "--parametrization", "mup"]) == 0
    assert "mup: pass (tolerance 0.15)" in capsys.readouterr().out
    assert main([*ARGUMENTS, "--parametrization", "standard"]) == 1
    assert "standard: FAIL, 11 of 12 modules" in capsys.readouterr().out


@pytest.mark.slow
def test_both_are_plotted_and_mup_decides_the_exit_status(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    assert main([*ARGUMENTS, "--output", str(tmp_path / "new" / "a.svg")]) == 0
    printed = capsys.readouterr().out
    assert "mup: pass" in printed and "standard: FAIL" in printed
    assert ET.parse(tmp_path / "new" / "a.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--widths", "64"], "--widths: [64]: expected two or more widths"),
        (["--widths", "32", "40"], "--widths: 40 is not a multiple of 32, two heads of --head-dim"),
        (["--steps", "0"], "--steps 0, --seeds 2, --sequence-length 32: expected at least 1"),
        (["--depths", "4"], "--depths: [4]: expected two or more numbers of layers"),
        (["--model", "qk_norm"], "--model qk_norm: expected KEY=VALUE"),
        (["--model", "qk_norms=per_head"], "command line  model.qk_norms"),
        (["--model", "qk_norm=foo"], "command line  model.qk_norm"),
    ],
)
def test_bad_input_is_reported(wrong, message, capsys):
    assert main(wrong) == 2
    assert capsys.readouterr().err.startswith(message)
