"""Who may write to a run directory, and what the dead leave in one."""

import errno
import os

import pytest

from components import durable, run_directory
from components.durable import replace_file
from components.run_directory import RunDirectory

pytestmark = pytest.mark.quick


def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "_PATIENCE_SECONDS", 0.0)
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with first.held(), pytest.raises(ValueError, match="another run is writing"), second.held():
        pass
    with second.held():
        pass


def test_whoever_holds_it_is_named_and_what_the_dead_held_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "_PATIENCE_SECONDS", 0.0)
    directory = RunDirectory(tmp_path / "run")
    with directory.held(), pytest.raises(ValueError, match=rf"process {os.getpid()} on "), directory.held():
        pass
    assert not directory.path.exists(), "left empty it is gone"
    directory.path.mkdir()
    (directory.path / run_directory.LOCK).write_text("process 1 on a node that lost its power")
    with directory.held() as kept_out:
        assert kept_out


def test_where_nothing_can_be_locked_nothing_is_swept(tmp_path, monkeypatch):
    def cannot(handle, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(run_directory.fcntl, "flock", cannot)
    unfinished = tmp_path / ".config.toml.abc.part"
    unfinished.write_text("of a run that may be alive")
    assert unfinished in tmp_path.glob(durable.UNFINISHED)
    with RunDirectory(tmp_path).held() as kept_out:
        assert not kept_out
    assert unfinished.exists()


def test_each_node_that_took_part_in_a_launch_knows_the_directory_again(tmp_path):
    directory = RunDirectory(tmp_path)
    assert not directory.belongs_to("one")
    directory.remember(["one", "two", "two"])
    assert directory.belongs_to("one") and directory.belongs_to("two")
    assert not any(directory.belongs_to(launch) for launch in ("on", "one\ntwo", None))


def test_checkpoints_behind_a_link_are_removed_too(tmp_path):
    directory, elsewhere = RunDirectory(tmp_path / "run"), tmp_path / "large disk"
    (elsewhere / "step-00000007").mkdir(parents=True)
    (elsewhere / "step-00000007" / "state.json").write_text("{}")
    directory.path.mkdir()
    directory.checkpoints.symlink_to(elsewhere)
    directory.clear()
    assert directory.checkpoints.is_symlink() and elsewhere.is_dir()
    assert not list(directory.checkpoints.iterdir())


def test_what_cannot_be_removed_is_an_error(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.checkpoints.mkdir()

    def busy(folder, **_):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(run_directory.shutil, "rmtree", busy)
    with pytest.raises(OSError, match="busy"):
        directory.clear()


def test_of_the_log_the_part_of_the_new_run_is_kept(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.log.write_text("old\n")
    with directory.log.open("a") as log:
        print("new", file=log, flush=True)
        directory.clear(log_from=4)
        print("newer", file=log, flush=True)
    assert directory.log.read_text() == "new\nnewer\n"
    directory.clear()
    assert not directory.log.exists()


def test_a_file_that_a_killed_run_was_writing_is_swept_away_by_the_next(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    replace_file(directory.config, "the old one")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable.Path, "replace", killed)
        patch.setattr(durable.Path, "unlink", lambda *_, **__: None)  # nobody tidies up after a kill
        replace_file(directory.config, "the new one")
    assert len(list(tmp_path.iterdir())) == 2
    with directory.held():
        assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "config.toml"]
        assert directory.config.read_text() == "the old one"
