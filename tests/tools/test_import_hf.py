"""Other models, old and new, are converted for a recipe; damaged, malicious and unknown ones are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.safetensors import Weights
from models.decoder import Decoder
from models.hf.architectures import ARCHITECTURES
from models.presets import LlamaShape
from models.rope import RopeScaling
from recipes.config import load
from recipes.initial_weights import copy_weights
from tests.models.hf.state_dicts import to_hf
from tools.import_hf import main

SIZE = LlamaShape(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, head_dim=12)
TIED = LlamaShape(dim=16, layers=1, heads=2, kv_heads=2, ffn_dim=24, tied_embeddings=True, rope_scaling=RopeScaling())
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MODEL = "model.safetensors"


def foreign(folder: Path, size: LlamaShape = SIZE, *, keep: bool = False, **entries) -> tuple[Path, Decoder]:
    """A directory as `transformers` would write it; an entry of None is left out of config.json."""
    model = Decoder(size, 31)
    model.init_weights(1)
    folder.mkdir()
    save_file(to_hf(model.state_dict(), size), folder / MODEL)
    config = {"architectures": ["LlamaForCausalLM"], **ARCHITECTURES["LlamaForCausalLM"].hf_config(model), **entries}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    weights = load_file(directory / MODEL) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, directory / MODEL)


def imported(directory: Path, tmp_path: Path, *arguments: str) -> Path:
    assert main([str(directory), str(tmp_path / "imported"), *arguments]) == 0
    return tmp_path / "imported"


def assert_holds(directory: Path, model: Decoder) -> None:
    """The weights, and by model.toml the shape, of `model`: bitwise."""
    recipe = directory.parent / "recipe.toml"
    recipe.write_text(
        f"extends = ['{directory / 'model.toml'}']\n[tokenizer]\nuse = 'components.tokenizers:Bytes'\n"
        "[data]\nuse = 'components.data:StandardLibrary'\n[optimizer]\nuse = 'components.optimizers:AdamW'\n"
        "[lr_schedule]\nuse = 'components.lr_schedules:WSD'\nmax_lr = 1e-3\n[batch]\n"
        "use = 'components.batch:Constant'\ninitial_size = 1\n"
        "[training]\ntotal_tokens = 100\nsequence_length = 8\nmicro_batch_size = 1\n"
    )
    config = load(recipe)
    assert config.recipe.run.init_from == directory
    back = config.recipe.model.build(vocab_size=31, sequence_length=8)
    assert (back.shape.head_width, back.shape.rope_scaling) == (model.shape.head_width, model.shape.rope_scaling)
    with Weights(directory) as weights:
        copy_weights(back, weights)
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("size", [SIZE, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [(), ("--max-shard-size=2KB",)], ids=["one file", "many"])
def test_weights_and_shape_arrive_bitwise(tmp_path, size, shards):
    directory, model = foreign(tmp_path / "theirs", size)
    once = imported(directory, tmp_path, *shards)
    assert_holds(once, model)
    (tmp_path / "again").mkdir()
    assert_holds(imported(once, tmp_path / "again"), model)  # what we write, we read


def test_old_pickles_with_frequencies_and_without_key_value_heads(tmp_path, capsys):
    size = LlamaShape(dim=16, layers=2, heads=2, kv_heads=2, ffn_dim=24)
    directory, model = foreign(tmp_path / "theirs", size, num_key_value_heads=None, head_dim=None, rope_parameters=None)
    weights = load_file(directory / MODEL)
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / MODEL).unlink()
    (directory / "tokenizer.json").write_text("{}")
    output = imported(directory, tmp_path)
    assert_holds(output, model)
    out = capsys.readouterr().out
    assert "left out 2 tensors that are recomputed: model.layers.0.self_attn.rotary_emb.inv_freq" in out
    assert "copied tokenizer.json" in out
    assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 2


def test_a_tied_head_under_either_name_or_both(tmp_path, capsys):
    directory, model = foreign(tmp_path / "theirs", TIED)
    table = model.state_dict()["tok_embeddings.weight"]
    change(directory, lm_head__weight=table.clone())
    assert_holds(imported(directory, tmp_path), model)
    change(directory, model__embed_tokens__weight=None)
    assert_holds(imported(directory, tmp_path, "--force"), model)
    assert f"read {HEAD} as {EMBEDDING}" in capsys.readouterr().out
    change(directory, model__embed_tokens__weight=table + 1)
    assert main([str(directory), str(tmp_path / "other")]) == 2
    assert "differ, but config.json ties them" in capsys.readouterr().err


def test_other_entries_of_a_configuration_are_kept_except_code(tmp_path):
    directory, _ = foreign(tmp_path / "theirs", eos_token_id=7, auto_map={"AutoModel": "x.Y"}, torch_dtype="float16")
    config = json.loads((imported(directory, tmp_path) / "config.json").read_text())
    assert config["eos_token_id"] == 7
    assert "auto_map" not in config
    assert (config["dtype"], config.get("torch_dtype")) == ("float32", None)


def truncated(directory: Path) -> None:
    (directory / MODEL).write_bytes((directory / MODEL).read_bytes()[:-10])


def oversized_header(directory: Path) -> None:
    content = (directory / MODEL).read_bytes()
    (directory / MODEL).write_bytes((2**50).to_bytes(8, "little") + content[8:])


def leading_elsewhere(directory: Path) -> None:
    (directory / MODEL).rename(directory.parent / "x.safetensors")
    table = dict.fromkeys(load_file(directory.parent / "x.safetensors"), "../x.safetensors")
    (directory / f"{MODEL}.index.json").write_text(json.dumps({"weight_map": table}))


class Runs:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def pickled_code(directory: Path) -> None:
    torch.save({**load_file(directory / MODEL), "x": Runs()}, directory / "pytorch_model.bin")
    (directory / MODEL).unlink()


REFUSED = {
    "truncated": (truncated, {}, "is damaged"),
    "oversized header": (oversized_header, {}, "is damaged"),
    "an index that leads elsewhere": (leading_elsewhere, {}, "not a file name in this directory"),
    "code in a pickle": (pickled_code, {}, "holds more than tensors, which is never loaded"),
    "a missing tensor": (lambda d: change(d, model__norm__weight=None), {}, r"1 missing ['model.norm.weight']"),
    "an unexpected tensor": (lambda d: change(d, extra=torch.ones(1)), {}, r"1 unknown ['extra']"),
    "another shape": (lambda d: change(d, model__norm__weight=torch.ones(7)), {}, "model.norm.weight is [7], not [16]"),
    "no weights": (lambda d: (d / MODEL).unlink(), {}, "neither model.safetensors nor"),
    "no configuration": (lambda d: (d / "config.json").unlink(), {}, "config.json does not exist"),
    "another architecture": (None, {"architectures": ["GPT2LMHeadModel"]}, "supported are LlamaForCausalLM"),
    "a bias": (None, {"attention_bias": True}, "config.json: attention_bias = True"),
    "an absurd number of layers": (None, {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    "many layers that are not there": (None, {"num_hidden_layers": 50}, "432 missing"),
    "a width that is not there": (None, {"hidden_size": 2**20}, "tensors do not have the shapes of the model"),
}


@pytest.mark.parametrize(("damage", "entries", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_reason_and_nothing_written(tmp_path, monkeypatch, capsys, damage, entries, message):
    monkeypatch.chdir(tmp_path)
    directory, _ = foreign(tmp_path / "theirs", **entries)
    if damage is not None:
        damage(directory)
    before = {path.name for path in tmp_path.iterdir()}
    assert main([str(directory), str(tmp_path / "imported")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_directory_is_not_imported_over_itself(tmp_path, capsys):
    directory, _ = foreign(tmp_path / "theirs")
    assert main([str(directory), str(directory), "--force"]) == 2
    assert "is the input directory" in capsys.readouterr().err


def test_a_real_old_checkpoint_gives_the_logits_transformers_gives(tmp_path, reference):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
    original = reference("checkpoints/tiny-random-llama")
    directory = imported(original, tmp_path)
    keys = ARCHITECTURES["LlamaForCausalLM"].config_from_hf(json.loads((directory / "config.json").read_text()))
    ours = ARCHITECTURES["LlamaForCausalLM"].build(keys)
    with Weights(directory) as weights:
        copy_weights(ours, weights)
    given = torch.randint(32_000, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = transformers.LlamaForCausalLM.from_pretrained(original, local_files_only=True)(given).logits
        normalized = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)(given).logits
        tolerance = 1e-6 * expected.abs().max().item() + 1e-7
        torch.testing.assert_close(ours(given), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(normalized, expected, rtol=0, atol=0)
