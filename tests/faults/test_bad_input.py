"""Every mistake of a user ends with status 2 and one clear message."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from components.train_step import TrainStep
from recipes import cli
from tests.conftest import TinyRun
from tests.faults.bad_arguments import ARGUMENTS, RECIPES
from tests.faults.bad_files import AFTER_A_RUN, FRESH

MODULES = {
    "fails.py": "raise KeyError('x')",
    "exits.py": "raise SystemExit(0)",
    "broken.py": "def f(:",
    "untyped.py": "class Mine:\n  def __init__(self, *, a): ...\n"
    "  def build(self, *, schedule, sequence_length, total_tokens): ...\n",
}
SHORT = "--training.total_tokens=400"


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_data", *(name.removesuffix(".py") for name in MODULES)):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps in it."""
    tiny = TinyRun(tmp_path_factory.mktemp("trained"))
    assert tiny.launch(SHORT) == 0
    return tiny.folder


def refused(capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], said: str) -> None:
    before = sorted(folder.rglob("run/*"))
    capsys.readouterr()
    status = cli.main(arguments)
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    assert said in output.err, output.out + output.err
    assert status == 2
    assert output.err.count("nothing was started") + output.err.count("the run has ended") <= 1
    left = [path for path in sorted(folder.rglob("run/*")) if path not in before and path.name != "log.txt"]
    assert not [path for path in left if "checkpoints" in str(path)]


def test_there_are_more_than_120() -> None:
    assert len(ARGUMENTS) + len(RECIPES) + len(FRESH) + len(AFTER_A_RUN) >= 120


@pytest.mark.parametrize("name", ARGUMENTS)
def test_on_the_command_line(tiny: TinyRun, capsys, monkeypatch, name: str) -> None:
    arguments, said = ARGUMENTS[name]
    (tiny.folder / "empty").mkdir()
    monkeypatch.chdir(tiny.folder)
    refused(capsys, tiny.folder, ["tiny.toml", *arguments.split()], said)


@pytest.mark.parametrize("name", RECIPES)
def test_in_a_recipe(tiny: TinyRun, capsys, monkeypatch, name: str) -> None:
    recipe, said = RECIPES[name]
    (tiny.folder / "mine.toml").write_text(recipe)
    for file, source in MODULES.items():
        (tiny.folder / file).write_text(source)
    monkeypatch.chdir(tiny.folder)
    refused(capsys, tiny.folder, ["mine.toml"], said)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_keys_to_lower(tiny: TinyRun, capsys, monkeypatch, error: Exception) -> None:
    def accumulate(*args: object, **kwargs: object) -> float:
        raise error

    monkeypatch.setattr(TrainStep, "accumulate", accumulate)
    refused(capsys, tiny.folder, [str(tiny.recipe)], "ran out of memory; halve training.micro_batch_size")


def test_sockets_that_loader_workers_could_not_open_are_reported_at_their_key(
    tiny: TinyRun, capsys, monkeypatch
) -> None:
    long = tiny.folder / ("long" * 30)
    long.mkdir()
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", str(long))  # as TMPDIR does
    arguments = [str(tiny.recipe), "--training.num_workers=1"]
    refused(capsys, tiny.folder, arguments, "command line  training.num_workers = 1\n    worker processes cannot open")
    assert not tiny.directory.exists()


@pytest.mark.parametrize("name", FRESH)
def test_in_text_tokenizers_and_datasets(tiny: TinyRun, capsys, name: str) -> None:
    spoil, said = FRESH[name]
    recipe = tiny.recipe.read_text()
    if "dataset" in name:
        tiny.recipe.write_text(recipe.replace('use = "components.data:TextFiles"\npath = "text/*.txt"', "", 1))
    refused(capsys, tiny.folder, [str(tiny.recipe), *spoil(tiny.folder)], said)


@pytest.mark.parametrize("name", AFTER_A_RUN)
def test_in_run_directories(trained: Path, tmp_path: Path, capsys, name: str) -> None:
    spoil, said = AFTER_A_RUN[name]
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    refused(capsys, folder, [str(folder / "tiny.toml"), SHORT, *spoil(folder)], said)
