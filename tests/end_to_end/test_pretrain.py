"""Small pre-training runs: what they write and log, and that custom components work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.config import flatten
from tests.run_info import WITH_TENSORBOARD

ROOT = Path(__file__).resolve().parents[2]

STEP_KEYS = {
    "step", "tokens", "samples", "epoch", "loss", "lr", "grad_norm", "global_batch_size", "requested_batch_size",
    "micro_batches", "noise_scale", "noise_scale_over_batch", "grad_cov_trace", "grad_sq_norm", "grad_cov_trace_ema",
    "grad_sq_norm_ema", "tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes",
}  # fmt: skip

USERS_PARTS = '''
"""Schedule, batch policy and dataset of a user, outside the project."""

from dataclasses import dataclass

import torch


@dataclass(kw_only=True)
class Steady:
    rate: float

    def lr(self, tokens, batch_tokens, total_tokens):
        return self.rate


@dataclass(kw_only=True)
class Doubling:
    first: int = 4

    def build(self, *, schedule, sequence_length, total_tokens):
        return self

    def next_batch_size(self, progress):
        return self.first if progress.step < 3 else 2 * self.first

    def measures_noise(self, progress):
        return False


class Counting(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return (torch.arange(self.length + 1) + index) % 200


@dataclass(kw_only=True)
class Numbers:
    def build(self, *, tokenizer, sequence_length, cache_dir, progress):
        return Counting(sequence_length)
'''


def test_a_run_writes_the_documented_files(tiny):
    assert tiny.launch(WITH_TENSORBOARD) == 0
    rows = tiny.rows()
    steps, validations = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert all(set(row) == STEP_KEYS for row in steps)
    assert all(set(row) == {"step", "tokens", "val_loss", "val_perplexity", "val_bits_per_byte"} for row in validations)
    assert [row["step"] for row in validations] == [4, 8, 12, steps[-1]["step"]]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5, "it learns"
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]
    assert steps[-1]["tokens"] == sum(row["global_batch_size"] for row in steps) * 24 >= 3600
    left = {path.name for path in tiny.directory.iterdir()}
    assert left == {
        "run.json",
        "environment.json",
        "config.toml",
        "metrics.jsonl",
        "log.txt",
        "tensorboard",
        "checkpoints",
    }
    assert "done:" in (tiny.directory / "log.txt").read_text()


def test_the_stored_configuration_launches_the_same_run(tiny, tmp_path, monkeypatch):
    assert tiny.launch("--training.total_tokens=600") == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    stored = tiny.directory / "config.toml"
    from recipes.cli import main

    assert main([str(stored), f"--run.dir={tmp_path / 'again'}"]) == 0
    again = flatten((tmp_path / "again" / "config.toml").read_text())
    assert again == {**flatten(stored.read_text()), "run.dir": str(tmp_path / "again")}
    losses = [row["loss"] for row in tiny.rows() if "loss" in row]
    tiny.directory = tmp_path / "again"
    assert [row["loss"] for row in tiny.rows() if "loss" in row] == losses


def folders_of_our_names(folder: Path) -> Path:
    """Return a working directory whose folders must not be taken for the packages of this project."""
    for name in ("recipes", "components", "models", "tools"):
        (folder / "elsewhere" / name).mkdir(parents=True)
        (folder / "elsewhere" / name / "__init__.py").write_text(f"raise ImportError('{name} of another project')")
    return folder / "elsewhere"


def test_schedule_policy_and_dataset_of_a_user_run_unchanged(tiny, tmp_path):
    (tiny.folder / "my_parts.py").write_text(USERS_PARTS)
    recipe = tiny.recipe.read_text()
    recipe = recipe.split("[lr_schedule]")[0].replace(
        'use = "components.data:TextFiles"\npath = "text/*.txt"', 'use = "my_parts:Numbers"'
    )
    recipe += '[lr_schedule]\nuse = "my_parts:Steady"\nrate = 0.01\n[batch]\nuse = "my_parts:Doubling"\n'
    tiny.recipe.write_text(recipe)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(  # from another directory, so that the custom code is not importable by accident
        [ROOT / "run_train.sh", tiny.recipe],
        env={**environment, "PYTHON": sys.executable},
        cwd=folders_of_our_names(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [row for row in tiny.rows() if "loss" in row]
    assert [row["global_batch_size"] for row in steps[:5]] == [4, 4, 4, 8, 8]
    assert {row["lr"] for row in steps} == {0.01}
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_corpus_is_prepared_by_several_processes_in_a_run(tiny, processes):
    """From 64 MiB on; they import the launcher's own file again, which must not start a run of theirs."""
    for number in range(3):
        text = f"It was the best of times, it was the {number}th of times.\n" * (2**26 // 3 // 50)
        (tiny.folder / "text" / f"large-{number}.txt").write_text(text)
    done = subprocess.run(
        [ROOT / "run_train.sh", tiny.recipe, "--training.total_tokens=384"],
        env={**os.environ, "PYTHON": sys.executable, "NPROC": processes, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "documents, 6" in done.stdout and "done: 384 tokens" in done.stdout


def test_packages_of_the_same_names_in_the_current_directory_are_not_imported(tiny, tmp_path):
    """On two processes; a single one starts there in the test of custom components."""
    done = subprocess.run(
        [ROOT / "run_train.sh", tiny.recipe, "--training.total_tokens=384"],
        env={**os.environ, "PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1"},
        cwd=folders_of_our_names(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


POISON = '''
import torch
from models.llama import Llama


class Poisoned(Llama):
    """A Llama whose loss is not a number for one batch of the run."""

    def build(self, **sizes):
        model = super().build(**sizes)
        forward, calls = model.forward, [0]

        def poisoned(tokens, labels=None):
            out = forward(tokens, labels)
            if labels is not None and model.training:
                calls[0] += 1
                if calls[0] == 10:  # the second micro-batch of step 3
                    return out * float("nan")
            return out

        model.forward = poisoned
        return model
'''


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_loses_nothing(tiny, capsys):
    (tiny.folder / "poison.py").write_text(POISON)
    arguments = ["--model.use=poison:Poisoned", "--model.size=debug", "--model.dim=16", "--model.layers=2"]
    arguments += ["--model.heads=2", "--model.kv_heads=1", "--model.head_dim=8", "--checkpoint.interval_steps=none"]
    assert tiny.launch(*arguments) == 1
    output = capsys.readouterr()
    assert "step 3 (samples 16 to 23): loss nan" in output.out
    assert str(tiny.checkpoint(2)) in output.out
    assert "--guard.on_nonfinite=skip" in output.out
    assert "Traceback" not in output.out + output.err
    assert tiny.checkpoint(2).is_dir()
    assert [row["step"] for row in tiny.rows()] == [1, 2]


def test_a_loss_that_is_not_finite_can_be_skipped(tiny, capsys):
    (tiny.folder / "poison.py").write_text(POISON)
    arguments = ["--model.use=poison:Poisoned", "--model.size=debug", "--model.dim=16", "--model.layers=2"]
    arguments += ["--model.heads=2", "--model.kv_heads=1", "--model.head_dim=8", "--guard.on_nonfinite=skip"]
    assert tiny.launch(*arguments) == 0
    assert "step 3 (samples 16 to 23): loss nan" in capsys.readouterr().out
    steps = [row for row in tiny.rows() if "lr" in row]
    assert [row["step"] for row in steps if row["loss"] is None] == [3]
    assert all(row["loss"] is not None for row in steps[3:])


@pytest.mark.parametrize(("samples", "times"), [(100, 1), (60, 0)])
def test_a_batch_larger_than_the_data_is_reported_once(tiny, samples, times):
    assert tiny.launch(f"--batch.stages=[{{from_tokens = 700, samples = {samples}}}]") == 0
    told = f"a step of {samples} samples repeats some of the 67 sequences of the data"
    assert (tiny.directory / "log.txt").read_text().count(told) == times


def test_print_config_can_be_launched_and_says_where_values_come_from(tiny, capsys):
    assert tiny.launch("--print-config", "--batch.initial_size=10") == 0
    printed = capsys.readouterr().out
    assert "initial_size = 10" in printed
    assert "# command line" in printed
    assert "# tiny.toml:" in printed or "tiny.toml:" in printed
    again = tiny.folder / "again.toml"
    again.write_text(printed)
    from recipes.cli import main

    assert main([str(again), "--print-config"]) == 0
    assert flatten(capsys.readouterr().out) == flatten(printed)


def test_dry_run_starts_nothing(tiny, capsys):
    assert tiny.launch("--dry-run") == 0
    printed = capsys.readouterr().out
    assert "multiples of 2" in printed
    assert not tiny.directory.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--training.total_token=5"], "did you mean total_tokens"),
        (["--data.path=nowhere/*.txt"], "nowhere"),
        (["--batch.initial_size=0"], "batch.initial_size"),
        (["--lr_schedule.warmup_tokens=1M"], "is more than training.total_tokens = 3600"),
        (["--model.kv_heads=3"], "3 does not divide the 2 heads"),
        (["--run.device=cuda"], "no CUDA device"),
        (["--tokenizer.use=components.tokenizers:Byte"], "Bytes"),
        (["--parallel.dp_shard=3"], "not the 1 processes of this run"),
        (["--nonsense"], "--section.key=value"),
        (["other.toml"], "expected one recipe, got 2"),
    ],
)
def test_a_mistake_has_one_message_and_status_2(tiny, capsys, arguments, said):
    assert tiny.launch(*arguments) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err + output.out
