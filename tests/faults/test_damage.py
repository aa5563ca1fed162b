"""A damaged checkpoint is named and the one before it is used; leftovers of interrupted saves are removed."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from components import run_directory
from components.checkpoint import DamagedError, remove_all, remove_partial_saves, run_of, verify
from tests.conftest import TinyRun, refusal
from tests.end_to_end.test_resume import assert_same_state, timeless
from tests.faults.bad_files import cut, flip
from tests.run_info import WITH_TENSORBOARD

SHORT = "--training.total_tokens=900"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    tiny = TinyRun(tmp_path_factory.mktemp("finished"))
    assert tiny.launch(SHORT) == 0
    return tiny


@pytest.fixture
def copy(finished: TinyRun, tmp_path: Path) -> TinyRun:
    tiny = TinyRun.__new__(TinyRun)
    tiny.folder = tmp_path / "copy"
    shutil.copytree(finished.folder, tiny.folder)
    tiny.recipe, tiny.directory = tiny.folder / "tiny.toml", tiny.folder / "run"
    return tiny


def last(tiny: TinyRun) -> int:
    return max(row["step"] for row in tiny.rows())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("damage", [cut("*.distcp"), flip(".metadata"), cut("state.json")])
def test_a_damaged_newest_is_named_and_the_one_before_continues_to_the_same_end(copy, finished, capsys, damage) -> None:
    step = last(finished)
    damage(copy.checkpoint(step))
    assert copy.launch("--resume", SHORT) == 0
    said = capsys.readouterr().out
    assert f"{copy.checkpoint(step)} is damaged: " in said
    assert f"; using {copy.checkpoint(step - 1)}" in said
    assert f"resumed from {copy.checkpoint(step - 1)}" in said
    assert_same_state(copy.checkpoint(step), finished.checkpoint(step))
    assert timeless(copy.rows()) == timeless(finished.rows())
    assert (copy.checkpoint(step).parent / f"damaged-{copy.checkpoint(step).name}").is_dir()


def test_all_damaged_is_an_error_and_so_is_one_that_was_asked_for(copy, capsys) -> None:
    for checkpoint in (copy.directory / "checkpoints").iterdir():
        cut("*.distcp")(checkpoint)
    for resume in ("--resume", f"--resume={copy.checkpoint(last(copy))}"):
        assert copy.launch(resume, SHORT) == 2
        assert "is damaged: __0_0.distcp has" in capsys.readouterr().err
    assert copy.checkpoint(last(copy)).is_dir(), "nothing was renamed"


@pytest.mark.parametrize("kept", [1, 2])
def test_the_copy_at_the_address_of_a_damaged_one_is_used(tiny, capsys, kept: int) -> None:
    remote = (f"--checkpoint.remote=file://{tiny.folder}/remote", f"--checkpoint.keep_last={kept}")
    assert tiny.launch(SHORT, *remote) == 0
    (*_, newest) = tiny.checkpoints()
    flip("*.distcp")(newest)
    assert tiny.launch("--resume", "--training.total_tokens=1200", *remote) == 0
    said = capsys.readouterr().out
    assert f"{newest} is damaged: " in said and f"; using {newest}" in said and f"resumed from {newest}: " in said
    shutil.rmtree(tiny.folder / "remote")
    damaged = tiny.checkpoints()[-1]
    flip("*.distcp")(damaged)
    arguments = ("--resume", "--training.total_tokens=1500", *remote)
    if kept == 1:
        assert f"{damaged} is damaged: " in refusal(tiny.launch, capsys, *arguments)
    else:
        assert tiny.launch(*arguments) == 0


def test_keeping_the_last_few_never_counts_a_damaged_one(copy) -> None:
    step = last(copy)
    earlier = copy.checkpoint(step).with_name(f"damaged-{copy.checkpoint(step).name}")
    shutil.copytree(copy.checkpoint(step), earlier)
    flip("*.distcp")(copy.checkpoint(step))
    assert copy.launch("--resume", "--training.total_tokens=1200", "--checkpoint.keep_last=1") == 0
    (kept,) = (path for path in (copy.directory / "checkpoints").iterdir() if path.name.startswith("step-"))
    verify(kept)
    assert len(list(earlier.parent.glob("damaged-*"))) == 2
    remove_all(earlier.parent, str(run_of(earlier)))
    assert not earlier.parent.exists()


@pytest.mark.quick
def test_leftovers_are_cleaned_and_what_was_being_replaced_comes_back(tmp_path) -> None:
    leftovers = (".writing-a-step-00000003", ".replaced-a-step-00000001", ".replaced-a-step-00000002")
    others = (".writing-b-step-00000003", ".replaced-b-step-00000004", ".writing-notes", "step-00000001")
    for name in (*leftovers, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(name)
    remove_partial_saves(tmp_path, "a")
    assert {path.name: (path / "state.json").read_text() for path in tmp_path.iterdir()} == {
        **{name: name for name in others},
        "step-00000002": ".replaced-a-step-00000002",
    }


def test_every_file_of_a_checkpoint_is_checked_against_the_manifest(finished, tmp_path) -> None:
    whole = finished.checkpoint(last(finished))
    verify(whole)
    names = [path.name for path in whole.iterdir()]
    assert len(names) == 5
    for name in names:
        broken = tmp_path / name
        shutil.copytree(whole, broken)
        flip(name)(broken)
        with pytest.raises(DamagedError, match="is damaged"):
            verify(broken)


def test_a_second_run_in_one_directory_is_refused_and_waits_for_one_that_leaves(copy, capsys, monkeypatch) -> None:
    handle = os.open(copy.directory / run_directory.LOCK, os.O_RDWR | os.O_CREAT)  # as another process would hold it
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(run_directory, "_LOCK_TIMEOUT_SECONDS", 0.2)
    assert copy.launch("--resume", SHORT) == 2
    assert "another run is writing to" in capsys.readouterr().err
    monkeypatch.setattr(run_directory, "_LOCK_TIMEOUT_SECONDS", 30.0)
    held = [handle]
    # the run also sleeps elsewhere, where this number may be another file
    monkeypatch.setattr(run_directory.time, "sleep", lambda seconds: os.close(held.pop()) if held else None)
    assert copy.launch("--resume", SHORT) == 0


def test_a_run_that_is_refused_leaves_no_directory(tiny, capsys) -> None:
    assert tiny.launch("--resume") == 2
    assert not tiny.directory.exists()


def test_tensorboard_shows_one_curve_after_five_interruptions(tiny) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    on = [WITH_TENSORBOARD, "--checkpoint.interval_steps=2"]
    assert tiny.launch(*on, "--training.total_tokens=1000") == 0
    for tokens in (1300, 1600, 1900, 2200, 2500):  # ends at a step that is not a multiple of two, and is dropped
        shutil.rmtree(tiny.checkpoint(last(tiny)))
        assert tiny.launch("--resume", *on, f"--training.total_tokens={tokens}") == 0
    events = EventAccumulator(str(tiny.directory / "tensorboard"))
    events.Reload()
    steps = [row for row in tiny.rows() if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in steps]
