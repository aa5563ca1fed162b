"""`[run] init_from`: a run starts from the weights of a Hugging Face directory; all other state is new."""

from __future__ import annotations

import json
import shutil

import pytest

from recipes.pretrained import load_pretrained
from tools import export_hf, import_hf


@pytest.fixture
def exported(tiny):
    """The tiny run, trained for some steps and exported; its last validation is in its rows."""
    assert tiny.launch("--training.total_tokens=1100", "--lr_schedule.max_lr=5e-2") == 0
    assert export_hf.main([str(tiny.directory), str(tiny.folder / "exported")]) == 0
    return tiny.folder / "exported"


def validations(directory) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["val_loss"] for row in rows if "val_loss" in row]


def again(tiny, name, weights, *arguments) -> int:
    place = tiny.folder / name
    return tiny.launch(f"--run.name={name}", f"--run.dir={place}", f"--run.init_from={weights}", *arguments)


STANDSTILL = ["--lr_schedule.max_lr=1e-30", "--lr_schedule.warmup_tokens=0", "--training.total_tokens=100"]
"""One step that changes no weight, so that the validation after it is that of the initial weights."""


def test_a_run_starts_at_the_loss_of_the_imported_model_with_a_fresh_clock(tiny, exported):
    assert again(tiny, "continued", exported, *STANDSTILL, "--training.activation_checkpoint=full") == 0
    assert validations(tiny.folder / "continued") == [validations(tiny.directory)[-1]]
    row = json.loads((tiny.folder / "continued" / "metrics.jsonl").read_text().splitlines()[0])
    assert (row["step"], row["tokens"]) == (1, 192)
    assert f"initialized the weights from {exported}" in (tiny.folder / "continued" / "log.txt").read_text()


def test_a_recipe_that_extends_the_imported_layer_needs_no_more(tiny, exported):
    assert import_hf.main([str(exported), str(tiny.folder / "imported")]) == 0
    # another shape below, to be replaced by that of the model
    text = tiny.recipe.read_text().replace("head_dim = 8", "head_dim = 4").replace("ffn_dim = 32", "ffn_dim = 8")
    (tiny.folder / "base.toml").write_text(text)
    tiny.recipe.write_text('extends = ["base.toml", "imported/model.toml"]\n')
    place = tiny.folder / "continued"
    assert tiny.launch(f"--run.dir={place}", *STANDSTILL) == 0
    assert validations(place) == [validations(tiny.directory)[-1]]


def test_a_resumed_run_does_not_ask_for_them_again(tiny, exported):
    assert again(tiny, "continued", exported, "--training.total_tokens=400") == 0
    shutil.rmtree(exported)
    assert again(tiny, "continued", exported, "--training.total_tokens=800", "--resume") == 0
    rows = [json.loads(line) for line in (tiny.folder / "continued" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["tokens"] for row in rows) >= 800


def test_keys_that_change_the_function_are_warned_about(tiny, exported, capsys):
    (exported / "model.safetensors.index.json").write_text("of a save before")
    assert again(tiny, "continued", exported, *STANDSTILL, "--model.rope_theta=500000.0") == 0
    said = (tiny.folder / "continued" / "log.txt").read_text()
    assert "run.init_from: rope_theta = 10000.0 in config.json, 500000.0 in [model]" in said
    assert "model.safetensors.index.json exist, and only the first is read" in said
    assert again(tiny, "planned", exported, "--model.rope_theta=500000.0", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "rope_theta = 10000.0 in config.json, 500000.0 in [model]" in out
    assert "model.safetensors.index.json exist, and only the first is read" in out
    (tiny.directory / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.raises(ValueError, match="holds both a Hugging Face model and checkpoints"):
        load_pretrained(tiny.directory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.ffn_dim=48", "--model.layers=3"], "has layers = 2, ffn_dim = 32; [model] has layers = 3, ffn_dim"),
        (["--model.vocab_size=300"], "has vocab_size = 257; [model] has vocab_size = 300"),
        (["--model.tied_embeddings=true"], "has tied_embeddings = False"),
    ],
    ids=["layers", "vocabulary", "tied"],
)  # fmt: skip
def test_another_shape_is_refused_before_training_and_in_the_dry_run(tiny, exported, capsys, arguments, message):
    capsys.readouterr()
    assert again(tiny, "continued", exported, *arguments) == 2
    error = capsys.readouterr().err
    assert "run.init_from = " in error
    assert message in error
    assert "Traceback" not in error
    assert again(tiny, "planned", exported, *arguments, "--dry-run") == 2
    assert message in capsys.readouterr().out


def test_a_dry_run_and_the_printed_configuration_show_them(tiny, exported, capsys):
    capsys.readouterr()
    assert again(tiny, "planned", exported, "--dry-run") == 0
    assert "init_from" not in capsys.readouterr().out
    assert again(tiny, "planned", tiny.folder / "nowhere", "--dry-run") == 0
    assert "nowhere is not a directory" in capsys.readouterr().out
    assert again(tiny, "planned", exported, "--print-config") == 0
    assert f'init_from = "{exported}"' in capsys.readouterr().out


def test_damaged_and_missing_weights_are_reported_without_a_traceback(tiny, exported, capsys):
    def refused(weights) -> str:
        capsys.readouterr()
        assert again(tiny, "continued", weights) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "run.init_from = " in error
        return error

    assert "is not a directory" in refused(tiny.folder / "nowhere")
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged, or is not a safetensors file" in refused(exported)
    file.rename(exported / "pytorch_model.bin")
    assert "tools.import_hf" in refused(exported)
    (exported / "config.json").write_text('{"model_type": "gpt2"}')
    assert "supported are LlamaForCausalLM" in refused(exported)
