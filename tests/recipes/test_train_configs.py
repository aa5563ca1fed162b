"""Every recipe that ships resolves, prints itself, can be planned at any size, and trains once it is made small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.presets import PRESETS
from recipes import cli
from recipes.config import Override, flatten, load
from recipes.dry_run import memory
from recipes.dry_run.plan import HardwareTarget, make_plan

FOLDER = Path(__file__).resolve().parents[2] / "train_configs"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.toml"))
"""Files in `base/` are extended by recipes and are not recipes."""
FROM_A_CHECKPOINT = {"critical_batch": "branches.checkpoint", "evaluate": "evaluation.checkpoint"}
"""What starts from one, and the key that names it: tests/end_to_end/ has a test for each."""
TRAINED = [name for name in SHIPPED if name not in FROM_A_CHECKPOINT]
PUBLISHED = ("microllama300m", "tinyllama1b", "llama3b", "llama3_8b")
FAMILIES = ("qwen3_0.6b", "olmo2_1b", "gemma3_1b")
POWER = ("powerlm36m", "powerlm1b", "powerlm3b", "powermoe1b", "powermoe3b")
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


def own_text(folder: Path) -> list[str]:
    """own_text.toml asks for these; so would any recipe that leaves its data open."""
    tokenizer = FOLDER.parent / "assets" / "tokenizers" / "stdlib-4096.tiktoken"
    return [f"--tokenizer.path={tokenizer}", f"--data.path={folder}", f"--validation.data.path={folder}"]


def arguments_for(name: str, folder: Path) -> list[str]:
    checkpoints = {recipe: [f"--{key}={folder}"] for recipe, key in FROM_A_CHECKPOINT.items()}
    return {"own_text": own_text(folder), **checkpoints}.get(name, [])


def resolved(name: str, folder: Path):
    pairs = (argument[2:].split("=", 1) for argument in arguments_for(name, folder))
    return load(FOLDER / f"{name}.toml", [Override(key, value) for key, value in pairs])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file as C4 has it, and as any recipe can read."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = (json.dumps({"text": TEXT[number:] * 3}) for number in range(20))
    (folder / "a.json").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_the_published_recipes_ship():
    assert {*PUBLISHED, *POWER, *FAMILIES} < set(SHIPPED)


@pytest.mark.quick
@pytest.mark.parametrize("name", SHIPPED)
def test_it_prints_what_it_is_and_that_is_the_same_again(name, text, tmp_path):
    config = resolved(name, text)
    printed = tmp_path / "printed.toml"
    printed.write_text(config.to_toml(), encoding="utf-8")
    assert flatten(load(printed).to_toml()) == flatten(config.to_toml())


@pytest.mark.quick
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name, text):
    recipe = resolved(name, text).recipe
    optimizer = recipe.optimizer
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)
    assert recipe.training.max_grad_norm == 1.0
    if name == "llama3_8b":
        return
    length = {"llama3b": 512}.get(name, 2048)
    assert recipe.training.sequence_length == length
    assert recipe.training.total_tokens == 2_000_000 * length
    assert recipe.lr_schedule.warmup_tokens == 20_000 * length
    assert (recipe.lr_schedule.max_lr, recipe.lr_schedule.min_lr_ratio) == (4e-4, 0.1)
    assert [stage.from_tokens for stage in recipe.batch.stages] == [50_000 * length, 100_000 * length]
    assert optimizer.weight_decay_on == "all"


@pytest.mark.quick
@pytest.mark.parametrize("name", POWER)
def test_the_published_numbers_of_power(name, text):
    """Shen et al. 2024: the learning rate, and what goes with it."""
    recipe = resolved(name, text).recipe
    optimizer, schedule, sequences = recipe.optimizer, recipe.lr_schedule, recipe.batch.initial_size
    batch_tokens = sequences * 4096
    assert (optimizer.betas, optimizer.weight_decay, recipe.model.init_std) == ((0.9, 0.95), 0.1, 0.1)
    assert recipe.model.resolved_shape == PRESETS[name] and recipe.model.depth_scaled_init
    assert (optimizer.eps, optimizer.weight_decay_on, optimizer.weight_decay_lr) == (1e-10, "matrices", "group"), (
        "dolomite-engine"
    )
    assert recipe.training.sequence_length == 4096
    published = {
        1024: {10**9: 0.02, 10**10: 0.02, 10**11: 0.0101, 10**12: 0.0031},
        64: {10**9: 0.0066, 10**10: 0.0020, 10**11: 0.00063, 10**12: 0.00019},
    }
    for tokens, lr in published[sequences].items():
        if tokens > recipe.training.total_tokens * 8 // 10:
            continue  # decaying
        assert schedule.lr(tokens, batch_tokens, recipe.training.total_tokens) == pytest.approx(lr, rel=0.02), tokens
    end = recipe.training.total_tokens
    assert schedule.lr(end, batch_tokens, end) == 0
    assert schedule.lr(end * 8 // 10, batch_tokens, end) == schedule.lr(end * 8 // 10, batch_tokens, 2 * end), "stable"


PARAMETERS = {"microllama300m": 304.6e6, "tinyllama1b": 1100.0e6, "llama3b": 3426.5e6, "llama3_8b": 8030.3e6}
PARAMETERS |= {
    "powerlm36m": 36.717e6,
    "powerlm1b": 1208.1e6,
    "powerlm3b": 3510.8e6,
    "powermoe1b": 1334.6e6,
    "powermoe3b": 3298.8e6,
}


@pytest.fixture
def once_per_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count activations and optimizer state once for a recipe: on one process they are those on any number of them."""
    for name in ("count_activations", "optimizer_bytes_per_element"):
        count, counted = getattr(memory, name), {}

        def remembered(model, *arguments, count=count, counted=counted, **sizes):
            key = str(model), repr(arguments), tuple(sizes.items())
            if key not in counted:
                counted[key] = count(model, *arguments, **sizes)
            return counted[key]

        monkeypatch.setattr(memory, name, remembered)


@pytest.mark.parametrize("name", TRAINED)
def test_it_can_be_planned_on_any_number_of_processes(name, text, monkeypatch, capsys, once_per_recipe):
    """No GPU, no weights, and for the published ones neither data nor tokenizer."""
    monkeypatch.delenv("RANK", raising=False)
    for processes, nodes in ((1, 1), (8, 1), (8, 8)) if name in FAMILIES else ((1, 1), (8, 8)):
        monkeypatch.setenv("NPROC", str(processes))
        monkeypatch.setenv("NNODES", str(nodes))
        shorter = ["--training.total_tokens=50B"] if name in POWER else []  # a million steps take seconds to play
        assert cli.main([str(FOLDER / f"{name}.toml"), "--dry-run", *arguments_for(name, text), *shorter]) == 0
        printed = capsys.readouterr().out
        assert f"processes      {processes * nodes} = " in printed
        if name in PARAMETERS:
            parameters = int(printed.split(" parameters")[0].split()[-1].replace(",", ""))
            assert parameters == pytest.approx(PARAMETERS[name], rel=2e-4)


@pytest.mark.parametrize("name", ["microllama300m"])
def test_the_stagewise_baseline_takes_the_steps_of_the_paper(name, text):
    """Lau et al. 2024, their tables of results: 269 steps at a mean batch of 7439."""
    schedule = make_plan(resolved(name, text), 4, HardwareTarget()).schedule
    assert schedule.num_steps == 269
    assert schedule.mean_batch == pytest.approx(7439, abs=2)


SMALL = {
    "model.dim": 32, "model.layers": 2, "model.heads": 4, "model.kv_heads": 2, "model.head_dim": 8, "model.ffn_dim": 48,
    "training.total_tokens": 64, "training.sequence_length": 32, "training.micro_batch_size": 2,
    "training.precision": "float32", "validation.micro_batch_size": 2, "validation.max_sequences": 2,
    "lr_schedule.warmup_tokens": 0, "run.device": "cpu", "metrics.writers.tensorboard": "none",
}  # fmt: skip
"""Reduced depth and width; the rest of a recipe stays as it ships."""


@pytest.mark.parametrize("name", TRAINED)
def test_it_takes_a_step_when_it_is_made_small(name, text, tmp_path, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "NPROC", "NGPU", "NNODES"):
        monkeypatch.delenv(variable, raising=False)
    reduced = {**SMALL, "run.dir": tmp_path / "run", "run.cache_dir": tmp_path / "cache"}
    arguments = ["--tokenizer.use=components.tokenizers:Bytes", "--batch.initial_size=8"]
    reduced |= {"data.use": "components.data:TextFiles", "data.path": text}
    reduced |= {"validation.data.use": "components.data:TextFiles", "validation.data.path": text}
    if name in (*PUBLISHED, *POWER, *FAMILIES):
        reduced["model.vocab_size"] = 257
    if name in POWER:
        reduced["model.mup.base_width"] = 16  # made small, it is still twice as wide as where nothing is scaled
    arguments += [f"--{key}={value}" for key, value in reduced.items()]
    assert cli.main([str(FOLDER / f"{name}.toml"), *arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 4 < rows[0]["loss"] < 7
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_every_size_has_numbers_a_recipe_can_name():
    assert {"microllama300m", "tinyllama1b", "openllama3b", "llama3_8b"} <= set(PRESETS)
