"""Every family of `transformers` computes the same: logits, loss, gradients, greedy text, and files in both directions.

The configurations are drawn: heads, groups, head widths, ties, biases, scalings, and windows shorter and longer than
the text. `benchmarks/parity.py` prints the differences in a table.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import parity
from components.safetensors import Weights
from models.decoder import Decoder
from models.hf.architectures import ARCHITECTURES, architecture_from_model
from models.hf.weights import hf_parts
from recipes.initial_weights import check_initial_weights, copy_weights

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
families = pytest.mark.parametrize("family", ARCHITECTURES)


@families
@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_logits_loss_gradients_and_greedy_text_are_equal(family, data):
    def choose(options):
        return options[data.draw(st.integers(0, len(options) - 1))]

    shape = parity.draw_shape(family, choose)
    found = parity.compare(shape, seed=0)
    # float32: up to 3e-5, 1.5e-7 and 1e-5 were seen
    assert found.logits < 5e-5
    assert found.loss < 1e-5
    assert found.gradient < 1e-4
    assert found.same_text


@families
def test_files_are_read_and_written_bitwise(family, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    shape = parity.draw_shape(family, random.Random(family).choice)
    name, ours, _ = parity.build_pair(shape, seed=1)
    write_model(ours, tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        local_files_only=True,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(report.values()), report
    tokens = torch.randint(parity.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(tokens)
        assert logits.std() > 0.5, "else the tolerance says nothing"
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=5e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    assert architecture_from_model(ours)[0] == name
    back = Decoder(ours.shape, ours.vocab_size)
    assert check_initial_weights(back, tmp_path / "theirs") == []
    torch.nn.init.constant_(back.norm.weight, math.nan)
    with Weights(tmp_path / "theirs") as weights:
        copy_weights(back, weights)
    assert all(torch.equal(back.state_dict()[key], value) for key, value in ours.state_dict().items())
    saved = safetensors.load_file(tmp_path / "theirs" / "model.safetensors")
    assert saved.keys() == hf_parts(shape).keys(), "their names for the same tensors"


def write_model(model: Decoder, folder: Path) -> None:
    """Write config.json and weights as tools/export_hf does."""
    safetensors = pytest.importorskip("safetensors.torch")
    name, architecture = architecture_from_model(model)
    folder.mkdir()
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    entries = {"architectures": [name], "model_type": architecture.model_type, **architecture.hf_config(model), **ids}
    (folder / "config.json").write_text(json.dumps(entries))
    weights = model.state_dict()
    tensors = {key: part.of(weights[part.name]).contiguous() for key, part in hf_parts(model.shape).items()}
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
