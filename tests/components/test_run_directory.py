"""The lock and the owner of a run directory, and what killed runs leave in it."""

import errno
import os

import pytest

from components import atomic_files, run_directory
from components.atomic_files import atomic_write
from components.run_directory import RunDirectory

pytestmark = pytest.mark.quick


def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "_LOCK_TIMEOUT_SECONDS", 0.0)
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with first.lock(), pytest.raises(ValueError, match="another run is writing"), second.lock():
        pass
    with second.lock():
        pass


def test_the_owner_of_the_lock_is_named_and_a_dead_owner_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "_LOCK_TIMEOUT_SECONDS", 0.0)
    directory = RunDirectory(tmp_path / "run")
    with directory.lock(), pytest.raises(ValueError, match=rf"process {os.getpid()} on "), directory.lock():
        pass
    assert not directory.path.exists(), "left empty it is gone"
    directory.path.mkdir()
    (directory.path / run_directory.LOCK).write_text("process 1 on a node that lost its power")
    with directory.lock() as kept_out:
        assert kept_out


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def cannot(handle, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(run_directory.fcntl, "flock", cannot)
    with RunDirectory(tmp_path).lock() as kept_out:
        assert not kept_out


def test_every_node_of_a_launch_recognizes_the_directory(tmp_path):
    directory = RunDirectory(tmp_path)
    assert not directory.owned_by("one")
    directory.claim()
    directory.record_owner("0123456789abcdef", ["one", "two", "two"])
    assert directory.owned_by("one") and directory.owned_by("two")
    assert not any(directory.owned_by(launch) for launch in ("on", "one\ntwo", None))


def test_a_file_that_cannot_be_removed_is_an_error(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.claim()
    directory.metrics.mkdir()
    with pytest.raises(OSError, match="directory"):
        directory.clear()


def test_the_part_of_the_log_of_the_new_run_is_kept(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.claim()
    directory.log.write_text("old\n")
    with directory.log.open("a") as log:
        print("new", file=log, flush=True)
        directory.clear(log_from=4)
        print("newer", file=log, flush=True)
    assert directory.log.read_text() == "new\nnewer\n"
    directory.clear()
    assert not directory.log.exists()


def test_a_lock_that_no_run_made_is_neither_overwritten_nor_removed(tmp_path):
    directory, elsewhere = RunDirectory(tmp_path), tmp_path / "elsewhere"
    lock = directory.path / run_directory.LOCK
    lock.write_text("of another program")
    with pytest.raises(ValueError, match="not the lock file of a run"), directory.lock():
        pass
    assert lock.read_text() == "of another program"
    elsewhere.write_text("mine")
    lock.unlink()
    lock.symlink_to(elsewhere)
    with pytest.raises(OSError), directory.lock():
        pass
    assert elsewhere.read_text() == "mine"


@pytest.mark.parametrize("name", ["run.json", "config.toml", "metrics.jsonl", "log.txt", "stop"])
def test_a_directory_with_a_file_that_no_run_wrote_is_not_claimed(tmp_path, name):
    directory = RunDirectory(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {name}, which this run would overwrite"):
        directory.claim()
    directory.clear()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert not directory.has_run and directory.run is None


def test_the_directory_of_a_run_of_another_kind_is_not_claimed(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.claim("a measurement")
    run = directory.run
    with pytest.raises(ValueError, match="holds a measurement"):
        directory.claim()
    directory.claim("a measurement")
    assert directory.run == run is not None


@pytest.mark.parametrize("name", ["config.toml", "environment.json"])
def test_a_temporary_file_of_a_killed_run_is_removed_by_the_next(tmp_path, monkeypatch, name):
    directory, file = RunDirectory(tmp_path), tmp_path / name
    directory.claim()
    (tmp_path / ".config.toml.new.part").write_text("of another program")
    atomic_write(file, "the old one")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic_files.Path, "replace", killed)
        patch.setattr(atomic_files.Path, "unlink", lambda *_, **__: None)  # a killed process does not clean up
        atomic_write(file, "the new one")
    assert len(list(tmp_path.iterdir())) == 4
    with directory.lock():
        directory.remove_temporary_files()
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [".config.toml.new.part", ".run.lock", name, "run.json"]
        assert file.read_text() == "the old one"
