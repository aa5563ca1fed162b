"""Only files that a run wrote are removed, replaced or truncated, also behind links and between other files."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from components import atomic_files
from components.atomic_files import atomic_write
from components.checkpoint import CheckpointManager, remove_all, remove_partial_saves
from components.checkpoint.host_memory import host_memory_directory, make_host_memory_directory
from components.data.file_hash_cache import FileHashCache
from components.interrupts import SignalCatcher, StopRequests
from components.metrics.tensorboard_events import EventFile
from components.run_directory import RunDirectory
from components.safetensors import new_directory
from recipes.run_setup import remove_old_run
from tests.components.checkpoint.test_manager import Alone
from tests.run_info import open_jsonl
from tools.sweep.runner import Results

ROOT = Path(__file__).resolve().parents[2]
RUN, OTHER_RUN = "a" * 16, "b" * 16


class Others:
    """Files of others, each with a unique text, so that it is found even if it was moved."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.texts = folder, set[bytes]()

    def write(self, *paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"foreign file {len(self.texts)}")
            self.texts.add(path.read_bytes())

    def are_all_there(self) -> bool:
        files = [Path(place, name) for place, _, names in os.walk(self.folder) for name in names]
        return self.texts <= {file.read_bytes() for file in files if file.exists()}


def moved_and_linked(path: Path, elsewhere: Path) -> None:
    """Move `path` to another place, and leave a link to it."""
    elsewhere.mkdir(exist_ok=True)
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


def save(store: CheckpointManager, *steps: int) -> None:
    for step in steps:
        assert store.save(step, {"weight": torch.zeros(2)}, {"clock": {}}, "a = 1\n")


def retention(folder: Path, others: Others) -> None:
    """Saves that remove older checkpoints; one of them is a link, one has a note in it, two are of another run."""
    place = folder / "checkpoints"
    save(CheckpointManager(place, Alone(), run=OTHER_RUN), 1, 2)
    save(CheckpointManager(place, Alone(), run=RUN), 3, 4, 5)
    moved_and_linked(place / "step-00000002", folder / "elsewhere")
    moved_and_linked(place / "step-00000004", folder / "elsewhere")
    others.write(place / "step-00000003" / "notes.md", place / "step-00000000" / "weights", place / "epoch=3.ckpt")
    save(CheckpointManager(place, Alone(), run=RUN, keep_last=1), 6)
    names = {path.name for path in place.glob("step-*")}
    assert names == {f"step-{step:08d}" for step in (0, 1, 2, 6)}, "what this run wrote and no longer needs is gone"
    assert len(list((folder / "elsewhere").rglob("*.distcp"))) == 2, "of a link, only the link"
    assert [path.name for path in place.glob("not-removed-step-00000003-*/*")] == ["notes.md"]
    store = CheckpointManager(place, Alone(), run=RUN)
    assert not store.save(1, {"weight": torch.zeros(2)}, {"clock": {}}, ""), "it would replace another run's"


def leftovers_of_dead_saves(folder: Path, others: Others) -> None:
    ours = [folder / f".writing-{RUN}-step-00000001", folder / f".replaced-{RUN}-step-00000002"]
    for path in (*ours, folder / "step-00000002", folder / f".writing-{OTHER_RUN}-step-00000001"):
        path.mkdir()
        (path / "state.json").write_text("{}")
    others.write(ours[0] / "notes.md", folder / ".writing-thesis", folder / ".replaced-step-00000003" / "state.json")
    (folder / "elsewhere").mkdir()
    others.write(folder / "elsewhere" / "state.json")
    (folder / f".writing-{RUN}-removed-step-00000007").symlink_to(folder / "elsewhere")
    remove_partial_saves(folder, RUN)
    assert not list(folder.glob(f".*-{RUN}-*"))
    assert (folder / f".writing-{OTHER_RUN}-step-00000001" / "state.json").exists()


def replacing_a_run(folder: Path, others: Others) -> None:
    """Its folders and files are links; beside what it wrote there lie others' files, and another run's."""
    directory, elsewhere = RunDirectory(folder / "run"), folder / "elsewhere"
    directory.path.mkdir()
    directory.claim()
    assert directory.run is not None
    save(CheckpointManager(directory.checkpoints, Alone(), run=directory.run), 1, 2)
    save(CheckpointManager(directory.checkpoints, Alone(), run=OTHER_RUN), 3)
    for run in (directory.run, OTHER_RUN):
        EventFile(directory.tensorboard, run).close()
    others.write(directory.checkpoints / "epoch=3.ckpt", directory.checkpoints / "keep" / "last.ckpt")
    others.write(directory.tensorboard / "old", directory.tensorboard / "events.out.tfevents.1700000000.host.1.0")
    others.write(directory.path / "notes.md", directory.path / "damaged-step-00000001" / "state.json")
    for path in (directory.metrics, directory.log, directory.config):
        others.write(path)
    for path in (directory.checkpoints, directory.tensorboard, directory.metrics, directory.log, directory.config):
        moved_and_linked(path, elsewhere)
    remove_old_run(directory)
    assert not directory.metrics.is_symlink() and not directory.config.is_symlink(), "of a file's link, the link"
    assert directory.checkpoints.is_symlink() and directory.tensorboard.is_symlink(), "folders stay where they are"
    assert [path.name for path in directory.checkpoints.glob("step-*")] == ["step-00000003"]
    kept = sorted(path.name.rpartition(".")[2] for path in directory.tensorboard.glob("events.*"))
    assert kept == ["0", OTHER_RUN]


def clearing_a_directory_that_is_no_runs(folder: Path, others: Others) -> None:
    directory = RunDirectory(folder)
    names = ("config.toml", "metrics.jsonl", "log.txt", "tensorboard/events.1", ".config.toml.7.part")
    others.write(*(folder / name for name in (*names, "checkpoints/step-00000001/state.json")))
    directory.remove_temporary_files()
    directory.clear()
    remove_old_run(directory)
    remove_all(directory.checkpoints, RUN)
    with pytest.raises(ValueError, match=r"no run\.json"):
        directory.claim()


def metrics_cut_on_resume(folder: Path, others: Others) -> None:
    rows = [json.dumps({"step": step}) + "\n" for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    moved_and_linked(folder / "metrics.jsonl", folder / "elsewhere")
    others.write(folder / "elsewhere" / "metrics.json", folder / "metrics.jsonl.bak")
    open_jsonl(folder / "metrics.jsonl", after_step=2).close()
    assert (folder / "elsewhere" / "metrics.jsonl").read_text() == "".join(rows[:3])


def a_file_replaced(folder: Path, others: Others) -> None:
    others.write(folder / "mine.toml", folder / ".config.toml.part")
    (folder / "config.toml").symlink_to(folder / "mine.toml")
    atomic_write(folder / "config.toml", "a = 1")
    assert (folder / "config.toml").read_text() == "a = 1" and not (folder / "config.toml").is_symlink()


def the_stop_file(folder: Path, others: Others) -> None:
    others.write(folder / "mine")
    (folder / "stop").symlink_to(folder / "mine")
    with SignalCatcher() as signals:
        StopRequests(signals, file=folder / "stop", ends_at=None).remove_stop_file()
    assert not (folder / "stop").is_symlink()


def prepared_data(folder: Path, others: Others) -> None:
    """A data set that is discarded, one of them behind a link, and what a dead process was preparing."""
    for name in ("set", "linked"):
        (folder / name).mkdir()
        (folder / name / "index.json").write_text("{}")
        others.write(folder / name / "notes.md")
    moved_and_linked(folder / "linked", folder / "elsewhere")
    for name in ("set", "linked"):
        atomic_files.remove_atomic(folder / name, ["index.json"])
        assert not os.path.lexists(folder / name)
    assert (folder / "elsewhere" / "linked" / "index.json").exists()
    others.write(folder / ".set.draft.part" / "chapter", folder / ".set.000000000000.part" / "chapter")
    for leftover in (*folder.glob(".set.*.part"),):
        os.utime(leftover, (0, 0))
    with atomic_files.atomic_directory(folder / "set") as temporary:
        (temporary / "index.json").write_text("{}")
    others.write(folder / "data.txt", folder / "file-hashes.json.bak")
    os.utime(folder / "data.txt", (0, 0))
    others.write(folder / "file-hashes.json")
    with FileHashCache(folder / "file-hashes.json") as hashes:
        hashes._changed = bool(hashes.sha256(folder / "data.txt"))  # a file of a moment ago would not be stored


def an_exported_model(folder: Path, others: Others) -> None:
    def export() -> None:
        with new_directory(folder / "model", force=True) as temporary:
            (temporary / "config.json").write_text("{}")

    export()
    moved_and_linked(folder / "model", folder / "elsewhere")
    export()
    assert (folder / "model").is_symlink() and (folder / "model" / "config.json").read_text() == "{}"
    others.write(folder / "model" / "thesis.tex")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is not listed"):
        export()
    (folder / "model" / "powertrain.json").unlink()
    with pytest.raises(ValueError, match=r"holds config\.json, which is not listed"):
        export()


def results_of_a_sweep(folder: Path, others: Others) -> None:
    """An incomplete last line is removed; in another file it might be the only content."""
    others.write(folder / "notes.md")
    (folder / "results.jsonl").symlink_to(folder / "notes.md")
    with pytest.raises(ValueError, match="is not a result of a sweep"):
        Results(folder / "results.jsonl")


def memory_of_killed_launchers(folder: Path, others: Others) -> None:
    killed, locked, elsewhere = folder / "powertrain-killed", folder / "powertrain-alive", folder / "other"
    for directory in (killed, locked, elsewhere):
        (directory / "step-00000003").mkdir(parents=True)
        (directory / "step-00000003" / "__0_0.distcp").touch()
    others.write(
        killed / "notes.txt", killed / "step-00000003" / "mine", elsewhere / "state.json", folder / "linked" / "a"
    )
    (killed / "step-00000004").symlink_to(folder / "linked")
    (folder / "powertrain-link").symlink_to(elsewhere)
    (folder / "powertrain-new").mkdir()
    with _locked(locked):
        with make_host_memory_directory(folder):
            own = host_memory_directory()
            assert own is not None
            (own / ".writing-step-00000001").mkdir()
            (own / ".writing-step-00000001" / ".metadata").touch()
            left = sorted(path.name for path in folder.rglob("*.distcp"))
            assert left == ["__0_0.distcp"] * 2, "of the one that is alive, and of the other directory"
            assert (folder / "powertrain-new").exists(), "its launcher may be about to lock it"
        assert host_memory_directory() is None
        assert not own.exists()
    with make_host_memory_directory(folder / "missing"):
        assert host_memory_directory() is None, "a machine without such a place"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


REMOVALS: list[Callable[[Path, Others], None]] = [
    retention,
    leftovers_of_dead_saves,
    replacing_a_run,
    clearing_a_directory_that_is_no_runs,
    metrics_cut_on_resume,
    a_file_replaced,
    the_stop_file,
    prepared_data,
    an_exported_model,
    results_of_a_sweep,
    memory_of_killed_launchers,
]


@pytest.mark.quick
@pytest.mark.parametrize("removal", REMOVALS, ids=lambda removal: removal.__name__)
def test_only_what_a_run_wrote_goes(tmp_path: Path, removal: Callable[[Path, Others], None]) -> None:
    others = Others(tmp_path)
    removal(tmp_path, others)
    assert others.texts and others.are_all_there()


@pytest.mark.quick
def test_the_table_of_removals_names_every_module_that_removes_something() -> None:
    table = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    removing = {"unlink", "rmtree", "rmdir", "remove", "truncate", "ftruncate", "rename", "replace"}
    found = set()
    for package in ("components", "recipes", "tools"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                one_argument = len(node.args) == 1 and not node.keywords  # a string's `replace` has two
                if node.func.attr in removing and (one_argument or node.func.attr not in ("rename", "replace")):
                    found.add(file.relative_to(ROOT).as_posix())
    found -= {"tools/coord_check.py"}  # the handle of a hook
    assert len(found) > 10
    assert not [name for name in found if name not in table]
