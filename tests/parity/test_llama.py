"""What only a Llama of `transformers` shows: explicit masks, its frequencies, an old checkpoint, ignored labels.

All families are in test_families.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from components.token_ids import IGNORE_INDEX
from models.decoder import Decoder
from models.hf.config import llama_entries
from models.llama import Llama
from models.presets import PRESETS, LlamaShape
from models.rope import Rope, RopeScaling
from tests.models.hf.state_dicts import from_hf, to_hf

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

V, B, T = 97, 2, 80
SMALL = LlamaShape(dim=64, layers=2, heads=4, kv_heads=4, ffn_dim=96)
SCALED_ROPE = RopeScaling(
    factor=4.0, original_max_position=64
)  # some frequencies are kept, some scaled, some in between


MODEL = replace(
    SMALL, dim=120, layers=3, heads=6, kv_heads=2, head_dim=100, rope_scaling=SCALED_ROPE, tied_embeddings=True
)


def pair(size: LlamaShape) -> tuple[Decoder, nn.Module]:
    """Return our model and theirs. Logits have a spread of 1 and norm gains differ, so that any mix-up is visible."""
    ours = Decoder(size, V, init_std=1.2 / math.sqrt(size.dim), depth_scaled_init=False)
    ours.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    config = transformers.LlamaConfig(**llama_entries(size, V), attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config).eval()
    result = theirs.load_state_dict(to_hf(ours.state_dict(), size), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == (["lm_head.weight"] if size.tied_embeddings else [])
    return ours, theirs


def tokens() -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 1, "else the tolerance says nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)  # requirement: 1e-4; float32 gives up to 1.5e-5


def test_document_masking_equals_an_explicit_mask_with_positions():
    ours, theirs = pair(MODEL)
    ours.enable_document_masking(end_of_document := 5)
    given = tokens()
    given[0, [3, 4, 31]] = given[1, [0, 60]] = end_of_document
    document = (given == end_of_document).cumsum(1)
    sees = (document[:, :, None] == document[:, None, :]).tril()
    position_ids = sees.sum(-1) - 1
    mask = torch.zeros(B, 1, T, T).masked_fill(~sees.unsqueeze(1), float("-inf"))
    with torch.no_grad():
        assert_same_logits(ours(given), theirs(given, attention_mask=mask, position_ids=position_ids).logits)


@pytest.mark.parametrize("name", [name for name, size in PRESETS.items() if size.rope_scaling])
@pytest.mark.parametrize("scaling", [None, SCALED_ROPE, RopeScaling(factor=1)], ids=["default", "scaled", "off"])
def test_scaled_frequencies_equal_those_of_transformers(name, scaling):
    size = replace(PRESETS[name], rope_scaling=scaling or PRESETS[name].rope_scaling)
    config = transformers.LlamaConfig(**llama_entries(size, V))
    reference, factor = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = torch.tensor(Rope(size.head_width, size.rope_theta, size.rope_scaling).frequencies())
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)  # theirs are computed in float32
    assert factor == 1


def test_a_real_checkpoint_gives_the_logits_transformers_gives(tiny_random_llama: Path):
    config = json.loads((tiny_random_llama / "config.json").read_text())
    weights = torch.load(tiny_random_llama / "pytorch_model.bin", weights_only=True)
    assert any(name.endswith("rotary_emb.inv_freq") for name in weights)
    llama = Llama(
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_attention_heads"],
        ffn_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        max_sequence_length=config["max_position_embeddings"],
    )
    ours = llama.build(vocab_size=config["vocab_size"], sequence_length=128)
    ours.load_state_dict(from_hf(weights, llama.resolved_shape))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tiny_random_llama, local_files_only=True)
    given = torch.randint(config["vocab_size"], (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, reference = ours(given), theirs(given).logits
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6 * reference.abs().max().item() + 1e-7)
    loss = ours(given, torch.nn.functional.pad(given[:, 1:], (0, 1), value=IGNORE_INDEX)) / (2 * 127)
    assert loss.item() == pytest.approx(theirs(given, labels=given).loss.item(), rel=1e-6)
