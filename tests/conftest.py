"""A run small enough to repeat often: a few kilobytes of text, bytes as tokens, a Llama of a few thousand weights."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from recipes import cli
from tests.processes import SIGNALS, reset_signals

hypothesis.settings.register_profile("powertrain", deadline=None)  # a busy machine must not fail a test
hypothesis.settings.load_profile("powertrain")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "quick":
        config.option.markexpr = "quick and not slow"


RECIPE = """
[run]
name = "tiny"
dir = "run"
cache_dir = "cache"
device = "cpu"

[model]
use = "models.llama:Llama"
size = "debug"
dim = 16
layers = 2
heads = 2
kv_heads = 1
head_dim = 8
ffn_dim = 32

[tokenizer]
use = "components.tokenizers:Bytes"

[data]
use = "components.data:TextFiles"
path = "text/*.txt"

[validation]
interval_steps = 4
max_sequences = 3
micro_batch_size = 2
  [validation.data]
  use = "components.data:TextFiles"
  path = "text/held_out/*.txt"

[training]
total_tokens = 3600        # 14 steps: 4 of 8 samples, then 10 of 12
sequence_length = 24
micro_batch_size = 2
precision = "float32"

[optimizer]
use = "components.optimizers:AdamW"

[lr_schedule]
use = "components.lr_schedules:WSD"
max_lr = 1e-2
warmup_tokens = 300

[batch]
use = "components.batch:Ramp"
initial_size = 8
stages = [{ from_tokens = 700, samples = 12 }]

[checkpoint]
interval_steps = 1
keep_last = "none"

[metrics.writers]
tensorboard = "none"
"""

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, "
)


def launch_here(arguments: list[str]) -> int:
    """Launch a recipe in this process and return the exit status.

    A run collects garbage after its first step; the million objects of the tests are frozen to keep that fast.
    """
    gc.freeze()
    try:
        return cli.main(arguments)
    finally:
        gc.unfreeze()


def refusal(launch: Callable[..., int], capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what `launch` reports of invalid arguments."""
    capsys.readouterr()
    assert launch(*arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


class TinyRun:
    """A recipe in its own folder, and the files of its run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "tiny.toml"
        self.directory = folder / "run"
        (folder / "text" / "held_out").mkdir(parents=True)
        for number in range(4):
            # about 1.6 kB of text in total: the run passes the end of an epoch twice
            (folder / "text" / f"{number}.txt").write_text(TEXT[number * 7 :] * 2)
        (folder / "text" / "held_out" / "a.txt").write_text(TEXT[50:] + TEXT)
        self.recipe.write_text(RECIPE)

    def launch(self, *arguments: str) -> int:
        """Launch the recipe in this process and return the exit status."""
        return launch_here([str(self.recipe), *arguments])

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted((self.directory / "checkpoints").glob("step-*"))

    def checkpoint(self, step: int) -> Path:
        return self.directory / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let all tests of a session, of every worker, share what the compiler of torch writes: minutes of a C++ compiler.

    A run would use a folder of its own cache, which is new in every test.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
        yield


@pytest.fixture
def reference() -> Callable[[str], Path]:
    """Return a function that finds real text, tokenizers and a checkpoint in shared/data, or skips the test."""

    def find(part: str) -> Path:
        folder = cli.ROOT.parent / "shared" / "data" / part
        if not folder.is_dir():
            pytest.skip(f"needs the reference data in {folder}")
        return folder

    return find


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """Set default signal handlers for a test that signals this process, whoever has started the tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    reset_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    for name in ("RANK", "WORLD_SIZE", "NPROC", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    return TinyRun(tmp_path)


@pytest.fixture
def new_tiny(tmp_path: Path) -> Callable[[str], TinyRun]:
    def make(name: str) -> TinyRun:
        (tmp_path / name).mkdir()
        return TinyRun(tmp_path / name)

    return make


@pytest.fixture
def clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove modules called `mine_...` and their import paths after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]
