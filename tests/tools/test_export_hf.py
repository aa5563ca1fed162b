"""An exported model equals the trained one, for `transformers` and for an independent reader."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from components.checkpoint import load_tensors
from components.safetensors import Weights
from models.decoder import Decoder
from recipes.config import load
from recipes.trained_model import load_pretrained
from tests.components.tokenizers.test_tokenizer_json import write_byte_tokenizer
from tests.models.hf.state_dicts import from_hf
from tests.tools import numpy_llama
from tools.export_hf import main

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = [
    "--tokenizer.use=components.tokenizers:TiktokenFile",
    f"--tokenizer.path={ROOT / 'assets/tokenizers/stdlib-4096.tiktoken'}",
    "--tokenizer.pattern=cl100k",
]
SCALED = "--model.rope_scaling={ factor = 4.0, original_max_position = 16 }"
MODELS = {
    "bytes, grouped heads": [],
    "tied": ["--model.tied_embeddings=true"],
    "rope scaling": [SCALED, "--model.rope_theta=1000.0"],
    "heads wider than dim": ["--model.head_dim=12"],
    "padded vocabulary": ["--model.vocab_size=320"],
    "all at once": [
        *TOKENIZER, SCALED, "--model.tied_embeddings=true", "--model.head_dim=10", "--model.heads=4",
        "--model.kv_heads=2", "--model.norm_eps=1e-3", "--model.vocab_size=4224",
    ],
}  # fmt: skip


def trained(tiny, *arguments: str) -> Decoder:
    """A tiny model after a few steps at a learning rate that makes its logits differ, and its checkpoint in `tiny`."""
    assert tiny.launch("--training.total_tokens=1100", "--lr_schedule.max_lr=5e-2", *arguments) == 0
    checkpoint = max((tiny.directory / "checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text())
    model = load(checkpoint / "config.toml").recipe.model.build(vocab_size=state["vocab_size"], sequence_length=24)
    load_tensors(checkpoint, {"model": model.state_dict()}, no_dist=True)
    return model


def export(tiny, *arguments: str) -> Path:
    output = tiny.folder / "exported"
    assert main([str(tiny.directory), str(output), *arguments]) == 0
    return output


def ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_the_same_logits_as_transformers_and_by_hand(tiny, arguments):
    ours = trained(tiny, *arguments)
    output = export(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    assert theirs.dtype == torch.float32
    given = ids(257)
    with torch.no_grad():
        expected = ours(given)
        found = theirs(given).logits
    assert expected.std() > 0.5, "else the tolerance says nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    by_hand = numpy_llama.logits(output, given[0].tolist())
    np.testing.assert_allclose(by_hand, expected[0].numpy(), rtol=0, atol=1e-4)


def test_every_weight_is_bitwise_in_one_file_or_many(tiny):
    ours = trained(tiny)
    for arguments, files in (((), 1), (("--max-shard-size=9KB", "--force"), 6)):
        output = export(tiny, *arguments)
        assert len(list(output.glob("*.safetensors"))) == files
        with Weights(output) as weights:
            back = from_hf({name: weights.read(name) for name in weights.specs}, ours.shape)
        assert back.keys() == ours.state_dict().keys()
        assert all(torch.equal(back[name], weight) for name, weight in ours.state_dict().items())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
        assert torch.equal(theirs.lm_head.weight, ours.output.weight)


def test_half_precision(tiny):
    ours = trained(tiny)
    output = export(tiny, "--dtype=bf16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, ours.output.weight.bfloat16())


def test_auto_tokenizer_encodes_as_we_do_and_text_ends_where_documents_do(tiny):
    trained(tiny, *TOKENIZER)
    output = export(tiny)
    ours = load(tiny.directory / "config.toml").recipe.tokenizer.build()
    theirs = transformers.AutoTokenizer.from_pretrained(output, local_files_only=True)
    for text in ((ROOT / "README.md").read_text(), (ROOT / "recipes/pretrain.py").read_text(), "Ça 鯨 🐋\r\n\t  x "):
        expected = ours.encode_batch([text])[0].tolist()
        assert theirs.encode(text) == expected
        assert theirs.decode(expected) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_document
    assert len(theirs) == ours.vocab_size
    model = transformers.AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == ours.end_of_document
    written = model.generate(**theirs("It was the", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert theirs.decode(written[0]).startswith("It was the")


def test_generation_is_greedily_the_same(tiny):
    ours = trained(tiny)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(tiny), local_files_only=True)
    text = torch.tensor([list(b"It was the best of ")])
    written = theirs.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        for _ in range(written.shape[1] - text.shape[1]):
            text = torch.cat((text, ours(text)[:, -1:].argmax(-1)), 1)
    assert written.tolist() == text.tolist()


def test_the_optimizer_is_not_read(tiny, monkeypatch):
    trained(tiny)
    read = []

    def noted(checkpoint: Path, tensors: dict, *, no_dist: bool) -> None:
        read.append(tensors)
        load_tensors(checkpoint, tensors, no_dist=no_dist)

    monkeypatch.setattr("recipes.averages.load_tensors", noted)
    export(tiny, "--max-shard-size=9KB")
    assert {key for tensors in read for key in tensors} == {"model"}
    assert len(read) == 6  # no more than one file's worth at a time


def test_a_tokenizer_that_is_gone_or_cannot_be_converted_is_left_out_with_a_warning(tiny, capsys):
    file = tiny.folder / "own.tiktoken"
    shutil.copy(ROOT / "assets/tokenizers/stdlib-4096.tiktoken", file)
    trained(
        tiny, *TOKENIZER, f"--tokenizer.path={file}", r"--tokenizer.pattern=\p{L}{1,3}+|\p{N}{1,3}+|\s|[^\s\p{L}\p{N}]"
    )
    assert not list(export(tiny).glob("tokenizer*"))
    assert "warning: no tokenizer was written: the `tokenizers` library encodes" in capsys.readouterr().out
    assert json.loads((tiny.folder / "exported/config.json").read_text())["eos_token_id"] == 4095
    file.unlink()
    output = export(tiny, "--force")
    assert "has no eos_token_id" in capsys.readouterr().out
    assert json.loads((output / "config.json").read_text())["eos_token_id"] is None
    transformers.AutoModelForCausalLM.from_pretrained(output, local_files_only=True)


def test_a_failed_export_is_reported_with_status_2(tiny, capsys):
    def refused(*arguments) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    output = tiny.folder / "exported"
    assert "is not a directory" in refused(tiny.folder / "nowhere", output)
    assert "neither a checkpoint nor a run directory" in refused(tiny.folder, output)
    trained(tiny, "--model.heads=3", "--model.kv_heads=3")
    assert "dim = 16 is not a multiple of heads = 3" in refused(tiny.directory, output)
    assert not output.exists()
    assert "not a size" in refused(tiny.directory, output, "--max-shard-size=big")

    shutil.rmtree(tiny.directory)
    trained(tiny)
    output.mkdir()
    (output / "thesis.tex").write_text("")
    assert "is not empty" in refused(tiny.directory, output)
    assert "thesis.tex, which is not listed" in refused(tiny.directory, output, "--force")
    checkpoint = max((tiny.directory / "checkpoints").iterdir())
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    assert "is damaged" in refused(checkpoint, tiny.folder / "other")
    assert sorted(path.name for path in tiny.folder.iterdir() if "part" in path.name or path.name == "other") == []


def test_a_special_token_that_is_not_encoded_needs_no_row(tiny, tmp_path, capsys):
    """As in Gemma 3: the run, its export and a run from the export have fewer rows than the tokenizer.json has ids."""
    keys = [
        f"--tokenizer.path={write_byte_tokenizer(tmp_path)}", "--tokenizer.use=components.tokenizers:TokenizerJson",
        "--tokenizer.end_of_document=</s>", "--model.vocab_size=257",
    ]  # fmt: skip
    assert tiny.launch("--dry-run", *keys) == 0
    assert "vocabulary 257" in capsys.readouterr().out
    trained(tiny, *keys)
    exported = export(tiny)
    assert "tokenizer in" in capsys.readouterr().out
    for source in (tiny.directory, exported):
        assert load_pretrained(source).load_tokenizer().vocab_size == 257
    assert tiny.launch(*keys, f"--run.init_from={exported}", "--run.if_exists=replace") == 0
    assert tiny.launch(*keys, "--tokenizer.parse_special=true", "--run.if_exists=replace") == 2
    assert "257 is too small for the tokenizer's 258 ids" in capsys.readouterr().err
