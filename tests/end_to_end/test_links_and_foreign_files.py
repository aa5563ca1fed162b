"""Run directories whose folders are links, and directories that hold files of others: nothing is lost in either."""

from __future__ import annotations

import shutil
from pathlib import Path

from components.checkpoint import list_checkpoints, verify
from tests.conftest import TinyRun
from tests.distributed.launching import finish, start, steps
from tests.faults.test_removals import Others, moved_and_linked
from tests.run_info import WITH_TENSORBOARD

STEP = 192
"""Tokens of each of the first four steps."""
ONE_STEP = [f"--training.total_tokens={STEP}", "--lr_schedule.warmup_tokens=100"]


def link_everything(tiny: TinyRun, *names: str) -> Path:
    """Move what is in the run directory to another place and link it back."""
    elsewhere = tiny.folder / "large disk"
    for name in names or ("checkpoints", "tensorboard", "metrics.jsonl", "log.txt", "config.toml"):
        moved_and_linked(tiny.directory / name, elsewhere)
    return elsewhere


def saved(directory: Path) -> list[int]:
    """Steps of the checkpoints in `directory`, each of which is as it was written."""
    for checkpoint in list_checkpoints(directory):
        verify(checkpoint)
    return [int(path.name[5:]) for path in list_checkpoints(directory)]


def test_a_run_behind_links_is_resumed_killed_and_started_again_and_loses_nothing(tiny):
    status, said = finish(start(tiny, f"--training.total_tokens={4 * STEP}"))
    assert status == 0, said
    elsewhere = link_everything(tiny, "checkpoints", "metrics.jsonl", "log.txt", "config.toml")
    status, said = finish(start(tiny, "--resume", sabotage={0: "kill:0:6"}, NPROC="1", MAX_RESTARTS="1"))
    assert status == 0, said
    assert "was killed by SIGKILL" in said and "restarting all processes" in said
    assert said.count("resumed from") == 2, "by --resume, and by the restart"
    assert saved(elsewhere / "checkpoints") == steps(tiny) == list(range(1, 9))
    assert (tiny.directory / "checkpoints").is_symlink()


def test_what_is_resumed_from_is_never_replaced_by_whatever_links_it_is_named(tiny, capsys):
    tokens = 2 * STEP
    on = ["--run.if_exists=replace", WITH_TENSORBOARD]
    assert tiny.launch(*on, f"--training.total_tokens={tokens}") == 0
    elsewhere = link_everything(tiny)
    (tiny.folder / "link").symlink_to(tiny.directory)
    (tiny.folder / "farm").mkdir()
    spellings = ["--resume", "--resume=link", "--resume=large disk/{}", "--resume=run/../run/{}", "--resume=farm"]
    for number, spelling in enumerate(spellings, 3):
        newest = tiny.checkpoint(number - 1)
        for file in newest.iterdir() if spelling.endswith("farm") else ():
            (tiny.folder / "farm" / file.name).symlink_to(file)
        resume = spelling.format(newest.relative_to(tiny.directory)).replace("=", f"={tiny.folder}/")
        tokens += STEP if number <= 4 else 288
        assert tiny.launch(*on, resume, f"--training.total_tokens={tokens}") == 0, spelling
        assert saved(elsewhere / "checkpoints") == list(range(1, number + 1)), spelling
    assert [row["step"] for row in tiny.rows() if "loss" in row] == list(range(1, len(spellings) + 3))

    # A new run, though, replaces the old one there, too, and its folders stay where they are.
    assert tiny.launch(*ONE_STEP) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert tiny.launch(*on, *ONE_STEP) == 0
    assert saved(elsewhere / "checkpoints") == [1]
    assert len(list((elsewhere / "tensorboard").iterdir())) == 1
    assert (tiny.directory / "checkpoints").is_symlink() and (tiny.directory / "tensorboard").is_symlink()


def test_a_link_to_an_empty_folder_is_an_empty_folder_and_one_to_nowhere_is_an_error(tiny, capsys):
    elsewhere = tiny.folder / "large disk"
    tiny.directory.mkdir()
    (tiny.directory / "checkpoints").symlink_to(elsewhere)
    for resume in ([], ["--resume"]):
        assert tiny.launch(*ONE_STEP, *resume) == 2
        assert f"is a link to {elsewhere}, which is not a directory" in capsys.readouterr().err
    elsewhere.mkdir()
    assert tiny.launch(*ONE_STEP) == 0
    assert saved(elsewhere) == [1]
    # Another run that is given the same folder neither uses nor removes these.
    other = tiny.folder / "other"
    other.mkdir()
    (other / "checkpoints").symlink_to(elsewhere)
    assert tiny.launch(*ONE_STEP, f"--run.dir={other}", "--run.if_exists=replace") == 2
    assert "was not written by the run that owns this directory" in capsys.readouterr().err
    assert saved(elsewhere) == [1]


def test_a_directory_with_other_files_keeps_all_of_them(tiny, capsys, monkeypatch):
    others, work = Others(tiny.folder), tiny.folder / "work"
    others.write(work / "checkpoints" / "epoch=3.ckpt", work / "checkpoints" / "keep" / "last.ckpt")
    others.write(work / "tensorboard" / "old", work / ".notes.1.part", work / "damaged-step-00000001" / "x")
    others.write(work / "checkpoints" / ".writing-step-00000001" / "x")
    monkeypatch.chdir(work)
    here = [
        "--run.dir=.",
        "--run.if_exists=replace",
        *ONE_STEP,
        WITH_TENSORBOARD,
    ]
    for _ in range(2):  # a new run, and one that replaces it
        assert tiny.launch(*here) == 0
        assert saved(work / "checkpoints") == [1]
        assert others.are_all_there()

    # What a run would have to overwrite makes it refuse, also where it may replace.
    for name in ("config.toml", "metrics.jsonl", "log.txt", "stop", "checkpoints/step-00000007/weights"):
        shutil.rmtree(work)
        others.write(work / name)
        monkeypatch.chdir(work)
        assert tiny.launch(*here) == 2, name
        said = capsys.readouterr().err
        assert "no run.json" in said or "was not written by the run that owns this directory" in said
        assert [path.name for path in work.iterdir()] == [name.partition("/")[0]], "nothing was added"
        assert (work / name).read_text().startswith("foreign")
