"""Names to and from Hugging Face: a bitwise round trip, and no weight lost, invented or taken for another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.decoder import Decoder
from models.presets import LlamaShape
from tests.models.hf.state_dicts import from_hf, names_in_hf, to_hf

pytestmark = pytest.mark.quick

UNTIED = LlamaShape(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24)
TIED = replace(UNTIED, tied_embeddings=True)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
both = pytest.mark.parametrize("size", [UNTIED, TIED], ids=["untied", "tied"])


def weights(size: LlamaShape) -> dict[str, torch.Tensor]:
    model = Decoder(size, 31)
    model.init_weights(0)
    return model.state_dict()


@both
def test_every_parameter_has_a_name_there_and_no_two_the_same(size):
    table = names_in_hf(size)
    assert table.keys() == weights(size).keys()
    assert len(set(table.values())) == len(table)


@both
def test_a_round_trip_is_bitwise_and_copies_nothing(size):
    ours = weights(size)
    back = from_hf(to_hf(ours, size), size)
    assert back.keys() == ours.keys()
    for name in ours:
        assert torch.equal(back[name], ours[name])
        assert back[name].data_ptr() == ours[name].data_ptr()


def test_neither_direction_changes_what_it_was_given():
    ours = weights(TIED)
    theirs = to_hf(ours, TIED) | {HEAD: ours["tok_embeddings.weight"]}
    before = set(theirs)
    from_hf(theirs, TIED)
    assert set(theirs) == before


def test_frequencies_that_old_checkpoints_store_are_dropped():
    theirs = to_hf(weights(UNTIED), UNTIED)
    stored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    assert from_hf(theirs | stored, UNTIED).keys() == weights(UNTIED).keys()


def test_a_tied_head_is_stored_once_and_read_from_either_name():
    ours = weights(TIED)
    theirs = to_hf(ours, TIED)
    assert HEAD not in theirs
    table = theirs[EMBEDDING]
    others = {name: weight for name, weight in theirs.items() if name != EMBEDDING}
    for stored in ({EMBEDDING: table}, {HEAD: table}, {EMBEDDING: table, HEAD: table.clone()}):
        assert from_hf(others | stored, TIED)["tok_embeddings.weight"].equal(table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"21 tensors: 1 missing \['model.norm.weight'\], 0 unknown \[\]"),
        ({"model.extra": torch.ones(1)}, r"0 missing \[\], 1 unknown \['model.extra'\]"),
        ({HEAD: None}, r"1 missing \['lm_head.weight'\]"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, r"1 unknown \['model.layers.2.mlp.up_proj.weight'\]"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(1)}, r"1 unknown .*q_proj.bias"),
    ],
    ids=["missing", "unknown", "no head", "a layer too many", "a bias"],
)
def test_weights_that_do_not_fit_are_named(changes, message):
    theirs = to_hf(weights(UNTIED), UNTIED) | changes
    with pytest.raises(ValueError, match=message):
        from_hf({name: weight for name, weight in theirs.items() if weight is not None}, UNTIED)
