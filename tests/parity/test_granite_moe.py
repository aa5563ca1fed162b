"""From an export with experts or muP, after some steps of our trainer, `transformers` computes the same.

Random weights are in test_families.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from components.checkpoint import load_tensors
from components.safetensors import Weights
from models.decoder import Decoder
from models.hf.config import granite_moe_entries
from models.mup import MuP
from models.presets import LlamaShape
from models.router_loss import RouterLossConfig
from recipes.config import load
from recipes.initial_weights import check_initial_weights, copy_weights
from tests.models.hf.state_dicts import names_in_hf, to_hf
from tools import export_hf, import_hf

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

V, B, T = 97, 2, 80
OFF = RouterLossConfig(load_balancing_coefficient=0, z_loss_coefficient=0)
SMALL = LlamaShape(dim=96, layers=2, heads=4, kv_heads=2, ffn_dim=32, experts=6, top_k=2)
MUP = MuP(base_width=32, embedding_multiplier=5.0, residual_multiplier=0.3)
MODEL = replace(SMALL, mup=MUP)


def theirs_of(ours: Decoder, folder: Path) -> nn.Module:
    """Write the weights under the names of files and load them with transformers, in float32."""
    safetensors = pytest.importorskip("safetensors.torch")
    config = granite_moe_entries(ours.shape, ours.vocab_size) | {
        "model_type": "granitemoe",
        "architectures": ["GraniteMoeForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(to_hf(ours.state_dict(), ours.shape), folder / "model.safetensors", {"format": "pt"})
    return opened(folder)


def opened(folder: Path) -> nn.Module:
    plain = {
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }  # no torch function that our model also uses
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **plain
    )
    assert not any(report.values()), report
    return model


def random_model(size: LlamaShape) -> Decoder:
    """Logits spread over some units and norm gains differ, so that any mix-up is visible."""
    base_width = size.dim if size.mup is None else size.mup.base_width
    model = Decoder(size, V, init_std=1.5 / math.sqrt(base_width), depth_scaled_init=False, router=OFF)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "norm.weight":
                parameter.fill_(math.sqrt(size.dim / base_width))
            if "norm" in name:
                parameter *= torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator)
    return model


def given(vocab_size: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return drawn[:, :-1], drawn[:, 1:]


def assert_same_function(ours: Decoder, theirs: nn.Module) -> None:
    tokens, labels = given(min(ours.vocab_size, 257))
    with torch.no_grad():
        mine, reference = ours(tokens), theirs(tokens).logits
    assert reference.std() > 0.5, "else the tolerance says nothing"
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)  # float32
    loss = ours(tokens, labels)
    expected = nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    in_memory = {  # version 5 renames tensors on load
        "router.layer.weight": "router.weight",
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
    }
    for name, parameter in ours.named_parameters():
        stored = names_in_hf(ours.shape)[name]
        for file, memory in in_memory.items():
            stored = stored.replace(file, memory)
        grad = theirs.get_parameter(stored).grad
        # requirement: 1e-3 of the norm
        assert grad.norm() > 0 and (parameter.grad - grad).norm() < 1e-4 * grad.norm(), name


def test_the_load_balancing_loss_of_one_layer_is_ours_times_top_k(tmp_path):
    ours = random_model(replace(MODEL, layers=1))
    tokens, labels = given()
    found = theirs_of(ours, tmp_path)(tokens, output_router_logits=True).aux_loss
    ours(tokens, labels)
    numbers = ours.metrics_of(ours.pop_metric_sums())
    assert found.item() == pytest.approx(2 * numbers["load_balancing_loss"], rel=1e-5)


KINDS = {
    "experts": ["--model.experts=4", "--model.top_k=2", "--model.ffn_dim=16", "--model.tied_embeddings=true"],
    "dense": [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_is_exported_opened_and_imported_again(tiny, kind, capsys):
    """After a few steps of the trainer, at a learning rate that makes routers and logits differ."""
    mup = ["--model.mup.base_width=8", "--model.mup.embedding_multiplier=12", "--model.mup.residual_multiplier=0.22"]
    more = ["--model.init_std=0.1", "--training.total_tokens=1100", "--lr_schedule.max_lr=5e-2"]
    assert tiny.launch(*KINDS[kind], *mup, *more) == 0
    checkpoint = max((tiny.directory / "checkpoints").iterdir())
    ours = load(checkpoint / "config.toml").recipe.model.build(vocab_size=257, sequence_length=24).eval()
    start = {name: weight.clone() for name, weight in ours.state_dict().items()}
    load_tensors(checkpoint, {"model": ours.state_dict()}, no_dist=True)
    assert all(not torch.equal(weight, start[name]) for name, weight in ours.state_dict().items()), "all are trained"

    exported, imported = tiny.folder / "exported", tiny.folder / "imported"
    assert export_hf.main([str(checkpoint), str(exported)]) == 0
    said = capsys.readouterr().out
    assert ("GraniteMoeForCausalLM" if kind == "experts" else "GraniteForCausalLM") in said
    theirs = opened(exported)
    if kind == "experts":
        assert theirs.config.router_aux_loss_coef == 0.01 / 2
        assert_same_function(ours, theirs)
    else:
        tokens, _ = given(257)
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)

    assert import_hf.main([str(exported), str(imported)]) == 0
    recipe = tiny.folder / "again.toml"
    recipe.write_text("extends = ['tiny.toml', 'imported/model.toml']")
    config = load(recipe)
    back = config.recipe.model.build(vocab_size=257, sequence_length=24)
    with Weights(imported) as weights:
        copy_weights(back, weights)
    assert back.shape == replace(ours.shape, head_dim=back.shape.head_dim)
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in ours.state_dict().items())
    assert check_initial_weights(ours, imported) == []


def test_another_top_k_or_other_multipliers_are_warned_of(tmp_path):
    size = MODEL
    ours = random_model(size)
    theirs_of(ours, tmp_path)
    for other, key in ((replace(size, top_k=3), "top_k"), (replace(size, mup=replace(MUP, base_width=96)), "mup")):
        (warning,) = check_initial_weights(Decoder(other, V), tmp_path)
        assert warning.startswith(f"{key} = ")
    with pytest.raises(ValueError, match=r"holds a GraniteMoeForCausalLM, but \[model\] is a GraniteForCausalLM"):
        check_initial_weights(Decoder(replace(size, experts=0), V), tmp_path)
    with pytest.raises(ValueError, match=r"has experts = 6; \[model\] has experts = 7"):
        check_initial_weights(Decoder(replace(size, experts=7), V), tmp_path)
